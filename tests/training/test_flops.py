"""Counted operations: by hand, as XLA counts them, and of whole training steps; and the peak they are held against."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from jaxdiff import mesh as meshes
from jaxdiff.build import build_network, build_process
from jaxdiff.models.attention import attend
from jaxdiff.training import flops
from jaxdiff.training.flops import count_flops, jaxpr_flops, least_step_time, matmul_peak, readable
from jaxdiff.training.objectives import Recipe, diffusion_objective
from jaxdiff.training.step import make_init, make_train_step


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def convolution(strides=(1, 1), padding="SAME", **settings):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lambda x, w: lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=dimensions, **settings)


def gradients(function):
    """(gradient of the output, arguments) -> the gradients of the arguments."""
    return lambda out, *args: jax.vjp(function, *args)[1](out)


IMAGE, KERNEL = array(2, 8, 8, 4), array(3, 3, 4, 6)
ROWS = 8 + 7 + 7  # products of one column of 8 pixels with a 3-tap kernel, padding 1: at the ends one falls off
CASES = {
    "matmul": (jnp.matmul, array(8, 16), array(16, 32), 8 * 16 * 32),
    "batched": (lambda a, b: jnp.einsum("bnhd,bmhd->bhnm", a, b), array(2, 5, 3, 8), array(2, 7, 3, 8), 6 * 5 * 7 * 8),
    "same": (convolution(), IMAGE, KERNEL, 2 * ROWS**2 * 4 * 6),
    "valid": (convolution(padding="VALID"), IMAGE, KERNEL, 2 * 6 * 6 * 9 * 4 * 6),
    "strided": (convolution((2, 2), ((1, 1), (1, 1))), IMAGE, KERNEL, 2 * 11**2 * 4 * 6),  # 4 + 4 + 3
    "grouped": (convolution(feature_group_count=2), IMAGE, array(3, 3, 2, 6), 2 * ROWS**2 * 2 * 6),
    "batch groups": (convolution(batch_group_count=2), IMAGE, KERNEL, 1 * ROWS**2 * 4 * 6),
    "dilated": (convolution(rhs_dilation=(2, 2)), IMAGE, KERNEL, 2 * 20**2 * 4 * 6),  # 8 + 6 + 6
    # 8 rows with zeros between them make 15; of 13 places every other one has 2 taps on rows, the 6 between them 1.
    "transposed": (convolution(padding=[(0, 0)] * 2, lhs_dilation=(2, 2)), IMAGE, KERNEL, 2 * 20**2 * 4 * 6),
}


@pytest.mark.parametrize("case", CASES)
def test_by_hand_and_as_xla_counts(case):
    """And the two gradients take twice as much, to the last product."""
    function, left, right, products = CASES[case]
    assert count_flops(function, left, right) == 2 * products
    assert jax.jit(function).lower(left, right).cost_analysis()["flops"] == 2 * products
    out = jax.eval_shape(function, left, right)
    assert count_flops(gradients(function), out, left, right) == 4 * products
    assert jax.jit(gradients(function)).lower(out, left, right).cost_analysis()["flops"] == 4 * products


SQUARE = array(8, 8)
ONE = 2 * 8**3


def test_control_flow():
    def scanned(x, w):
        return lax.scan(lambda c, _: (c @ w, None), x, length=5)[0]

    def branches(x, w):
        return lax.switch(x[0, 0].astype(int), [lambda: x, lambda: x @ w @ w, lambda: w @ x])

    def looping(x, w):
        return lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c - w, x) @ w

    def endless(x, w):
        return lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ w, x)

    def everything(x, w):
        return jax.jit(lambda x: jax.nn.silu(branches(scanned(x, w), w)))(x)

    assert [count_flops(f, SQUARE, SQUARE) for f in (scanned, branches, everything)] == [5 * ONE, 2 * ONE, 7 * ONE]
    assert count_flops(looping, SQUARE, SQUARE) == ONE
    with pytest.raises(ValueError, match="products in a while"):
        count_flops(endless, SQUARE, SQUARE)


def test_only_what_reaches_an_output():
    """Of a gradient that is taken and hardly used, XLA computes no more either (see `adversarial.py`)."""

    def forward(ws, x):
        return ((x @ ws[0]) @ ws[1]).sum()

    whole = jax.grad(forward)
    last = jax.jit(lambda ws, x: whole(ws, x)[1])
    assert count_flops(whole, [SQUARE, SQUARE], SQUARE) == 4 * ONE
    assert count_flops(last, [SQUARE, SQUARE], SQUARE) == 2 * ONE


def test_what_a_checkpoint_computes_again_does_not_count():
    """Nor in a scan, where it is another jaxpr; XLA counts the product that is computed twice."""

    def loss(w, x, wrap=jax.checkpoint):
        return jnp.sin(wrap(lambda x: jnp.sin(x @ w) @ w)(x)).sum()

    def scanned(w, x):
        return lax.scan(lambda c, x: (c + loss(w, x), None), jnp.zeros(()), x[None].repeat(5, 0))[0]

    assert count_flops(loss, SQUARE, SQUARE) == 2 * ONE
    for function, times in ((loss, 1), (scanned, 5), (jax.checkpoint(scanned), 5)):
        assert count_flops(jax.value_and_grad(function), SQUARE, SQUARE) == times * (2 + 3) * ONE
    plain, checkpointed = (
        jax.jit(jax.grad(functools.partial(loss, wrap=wrap))).lower(SQUARE, SQUARE).cost_analysis()["flops"]
        for wrap in (lambda f: f, jax.checkpoint)
    )
    assert ONE <= checkpointed - plain < 1.5 * ONE


@pytest.mark.parametrize("chunk", [8, 24])
def test_attention_by_chunks_counts_as_all_at_once(chunk):
    q, k = array(2, 64, 3, 8), array(2, 40, 3, 8)

    def counts(*chunk):
        def forward(q, k, v):
            return attend(q, k, v, *chunk)

        def both(out, *args):
            attended, pull = jax.vjp(forward, *args)
            return attended, pull(out)

        return count_flops(forward, q, k, k), count_flops(both, q, q, k, k)

    product = 2 * (2 * 3 * 64 * 40 * 8)
    assert counts(chunk) == counts() == (2 * product, 6 * product)


def test_custom_gradients():
    @jax.custom_vjp
    def f(x, w):
        return x @ w

    f.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g @ saved[1]))
    assert count_flops(f, SQUARE, SQUARE) == ONE
    assert count_flops(jax.value_and_grad(lambda x, w: f(x, w).sum(), (0, 1)), SQUARE, SQUARE) == 4 * ONE


def test_all_devices_of_a_shard_map():
    mesh, rows = meshes.make_mesh(), PartitionSpec("data")
    assert mesh.size == 8

    def product(x, w):
        return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)(x, w)

    assert count_flops(product, array(16, 8), SQUARE) == 2 * ONE


def test_attention_by_cudnn_counts_as_by_xla(monkeypatch):
    """Traced only: the kernel, of which nothing can be seen inside, is for GPUs."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 92000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda least: True)
    half = jnp.bfloat16
    q, k = array(2, 128, 3, 64, dtype=half), array(2, 64, 3, 64, dtype=half)

    def attend(kernel):
        return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation=kernel)

    def with_gradients(kernel):
        def values(out, *args):
            attended, pull = jax.vjp(attend(kernel), *args)
            return attended, pull(out)

        return values

    product = 2 * (2 * 3 * 128 * 64 * 64)
    for kernel in ("xla", "cudnn"):
        assert count_flops(attend(kernel), q, k, k) == 2 * product
        assert count_flops(with_gradients(kernel), q, q, k, k) == 6 * product


@pytest.fixture(scope="module")
def unet_steps(tiny):
    """The training step of the tiny UNet, whole and in two parts, and what its forward pass takes."""
    config = tiny("ddpm")
    config.model.update(channel_mult=(1,), attention_resolutions=(8,))
    unet, mesh, optimizer = build_network(config, 3, 10), meshes.make_mesh(), optax.adamw(1e-3)
    objective = diffusion_objective(unet, build_process(config), Recipe(label_dropout=0.1), null_label=10)
    x, label = array(16, 8, 8, 3), array(16, dtype=jnp.int32)

    def init(key):
        return unet.init(key, jnp.zeros(x.shape), jnp.zeros(16, jnp.int32), jnp.zeros(16, jnp.int32))

    state = jax.eval_shape(make_init(init, optimizer, mesh), jax.random.key(0))
    batch = {"image": array(16, 8, 8, 3, dtype=jnp.uint8), "label": label}
    settings = {"mesh": mesh, "seed": 0, "ema_decay": 0.9}
    steps = [
        make_train_step(objective, optimizer, lambda n: 1e-3, **settings, accumulate=parts).trace(state, batch, ())
        for parts in (1, 2)
    ]
    return count_flops(unet.apply, state.params, x, label, label), *steps, state.params


def test_a_training_step_is_three_forward_passes(unet_steps):
    forward, whole, parts, weights = unet_steps
    count = jaxpr_flops(whole.jaxpr)
    assert 2.95 < count / forward < 3  # nobody asks for the gradient of the image
    # Both parts have products of the values' biases with the projections, one forward and two backward for each.
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    bias = sum(3 * 2 * kernel.size for path, kernel in leaves if "proj" in str(path) and kernel.ndim == 2)
    assert jaxpr_flops(parts.jaxpr) == count + bias
    # XLA counts the norms, activations and the optimiser as well, which in a network so small are some percent.
    assert 1.03 < whole.lower().cost_analysis()["flops"] / count < 1.09


def test_peak_is_that_of_matrix_products():
    peak = matmul_peak(jnp.dtype("float32"))
    assert 1e9 < peak < 1e14  # one core's scalar code, and more than a CPU has
    assert matmul_peak(jnp.dtype("float32")) == peak  # measured once


def test_time_at_the_peak_is_said_and_nothing_fails(unet_steps, monkeypatch, capsys):
    _, whole, *_ = unet_steps
    monkeypatch.setattr(flops, "matmul_peak", lambda dtype: 5e11)
    least = least_step_time("diffusion", lambda: jaxpr_flops(whole.jaxpr), 16, jnp.bfloat16, 8)
    assert least == jaxpr_flops(whole.jaxpr) / 8 / 5e11
    said = "diffusion: 15.4 MFLOP an image, peak 500 GFLOP/s a device (bfloat16 matrix products)\n"
    assert capsys.readouterr().out == said

    def no_memory(dtype):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(flops, "matmul_peak", no_memory)
    assert least_step_time("diffusion", lambda: jaxpr_flops(whole.jaxpr), 16, jnp.bfloat16, 8) is None
    assert capsys.readouterr().out == "diffusion: no mfu in metrics.jsonl: out of memory\n"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 "), (999, "999 "), (1e3, "1 K"), (8.12e14, "812 T"), (2e22, "2e+04 E")]
)
def test_readable(value, text):
    assert readable(value) == text
