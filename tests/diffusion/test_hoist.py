"""What is computed before a sampler's loop instead of in it, and that it is the same."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff import diffusion
from jaxdiff.diffusion.hoist import hoist
from jaxdiff.models.layers import Conv3x3
from jaxdiff.models.unet import UNet

X = jnp.linspace(-1, 1, 12).reshape(4, 3)


def operations(function, *args):
    return [str(eqn.primitive) for eqn in jax.make_jaxpr(function)(*args).eqns]


def test_hoisted_is_what_does_not_depend_on_the_arguments():
    kernel, bias = jnp.arange(12.0).reshape(3, 4), jnp.arange(4.0)

    def function(x, t):
        y = jnp.cos(x @ jnp.sin(kernel).astype(jnp.bfloat16)) + bias[None]
        return {"y": y, "twice": 2 * t, "kernel": jnp.sin(kernel)}

    hoisted = hoist(function, X, 1.0)
    inside = operations(hoisted, X, 1.0)
    assert "cos" in inside and "sin" not in inside
    jax.tree.map(np.testing.assert_array_equal, hoisted(X, 3.0), function(X, 3.0))


def test_large_results_of_small_ones_stay_where_they_are():
    row, column = jnp.arange(100.0), jnp.arange(100.0)
    inside = operations(hoist(lambda x: x + jnp.sin(row[:, None] * column[None]).sum(), X), X)
    assert "sin" in inside


def test_upsampling_finds_its_kernel_reversed_in_the_loop_where_cudnn_is_known_by_it():
    conv, x = Conv3x3(2, jnp.float32, form="up"), jnp.ones((1, 4, 4, 3))
    params = conv.init(jax.random.key(0), x)
    inside = str(jax.make_jaxpr(hoist(lambda x: conv.apply(params, x), x))(x))
    assert "rev[" in inside and "lhs_dilation=(2, 2)" in inside and "concatenate" not in inside


def test_hoisting_within_a_traced_function_and_its_gradient():
    def loss(kernel):
        return hoist(lambda x: jnp.tanh(x @ jnp.exp(kernel)), X)(X).sum()

    kernel = jnp.linspace(0, 1, 6).reshape(3, 2)
    expected = jax.grad(lambda kernel: jnp.tanh(X @ jnp.exp(kernel)).sum())(kernel)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(kernel), expected, rtol=1e-4)


def test_a_samplers_loop_finds_parameters_in_the_dtype_of_the_computation():
    network = UNet(out_channels=3, channels=32, channel_mult=(1, 2), num_res_blocks=1, dtype=jnp.bfloat16)
    x, t = jnp.zeros((2, 8, 8, 3)), jnp.zeros(2)
    params = jax.eval_shape(network.init, jax.random.key(0), x, t)
    plan = diffusion.make_plan(diffusion.make_schedule("linear"), "ddim", steps=4)

    def draw(params, x):
        keys = diffusion.sample_keys(jax.random.key(0), jnp.arange(2))
        return diffusion.sample(lambda x, t: network.apply(params, x, t), plan, x, keys, clip=True)

    def kernels_converted(jaxpr):
        found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "convert_element_type"]
        shapes = [eqn.invars[0].aval.shape for eqn in found if eqn.params["new_dtype"] == jnp.bfloat16]
        return sum(shape[:-2] == (3, 3) or (len(shape) == 2 and min(shape) >= 32) for shape in shapes)

    (loop,) = [e for e in jax.make_jaxpr(draw)(params, x).eqns if e.primitive.name in ("scan", "while")]
    assert kernels_converted(loop.params.get("jaxpr") or loop.params["body_jaxpr"]) == 0
    assert kernels_converted(jax.make_jaxpr(network.apply)(params, x, t)) > 30
