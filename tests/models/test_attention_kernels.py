"""The kernels of attention against attention as it is written down, gradients included, by Pallas's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxdiff import mesh as meshes
from jaxdiff.models import attention, attention_kernels, forms, norm
from jaxdiff.models.attention import Attention, attend_by_tiles, attention_kernel
from jaxdiff.training.flops import count_flops

KEY = jax.random.key(0, impl="rbg")
TILE = attention_kernels.TILE


def draw(name, *shape, dtype="float32"):
    return jax.random.normal(jax.random.fold_in(KEY, sum(map(ord, name))), shape).astype(dtype)


def inputs(batch, n, m, heads=2, d=16, dtype="float32"):
    lengths = {"q": n, "k": m, "v": m}
    return [draw(name, batch, length, heads, d, dtype=dtype) for name, length in lengths.items()]


def ours(*arguments):
    return attend_by_tiles(True, *arguments)


def plain(*arguments):
    return jax.nn.dot_product_attention(*arguments, implementation="xla")


def with_gradients(function, arguments):
    def both(arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, *pull(draw("dy", *y.shape, dtype=y.dtype))

    return jax.jit(both)(arguments)


@pytest.mark.parametrize(("n", "m"), [(TILE, TILE), (4 * TILE, 4 * TILE), (2 * TILE, 3 * TILE), (3 * TILE, TILE)])
def test_kernels_are_attention(n, m):
    arguments = inputs(2, n, m)
    arguments[0] = 3 * arguments[0]  # so that some weights are large
    for a, b in zip(with_gradients(ours, arguments), with_gradients(plain, arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_logits_may_be_large():
    q, k, v = inputs(1, TILE, 2 * TILE)
    arguments = 300 * q, k, v
    for a, b in zip(with_gradients(ours, arguments), with_gradients(plain, arguments), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


def test_half_precision_is_as_exact_as_that_of_xla():
    arguments = inputs(2, 2 * TILE, 2 * TILE, dtype="bfloat16")
    exact = with_gradients(plain, [a.astype(jnp.float32) for a in arguments])
    of_xla, of_ours = (with_gradients(f, arguments) for f in (plain, ours))
    for a, b, c in zip(of_ours, of_xla, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        error, usual = (np.linalg.norm(np.asarray(x, np.float32) - c) / np.linalg.norm(c) for x in (a, b))
        assert error < max(1.2 * usual, 3e-3)


def test_batch_that_is_split_over_devices():
    mesh = meshes.make_mesh()
    arguments = inputs(2 * mesh.size, TILE, TILE)
    split = meshes.batch_sharding(mesh)
    results = with_gradients(ours, jax.device_put(arguments, split))
    for a, b in zip(results, with_gradients(plain, arguments), strict=True):
        assert a.sharding.is_equivalent_to(split, a.ndim)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kernels_are_what_triton_takes():
    arguments = [jax.ShapeDtypeStruct((8, 256, 4, 64), jnp.bfloat16)] * 3
    card = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")  # which JAX asks for since 0.11
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=card)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda *a: jax.vjp(lambda *b: attend_by_tiles(False, *b), *a)[1](a[0])).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(f"attention_{name}" in text for name in ("forward", "gradient_of_queries", "gradient_of_keys"))


def test_what_is_counted_of_them_is_what_is_counted_of_plain_attention():
    arguments = inputs(2, 2 * TILE, TILE)
    assert count_flops(ours, *arguments) == count_flops(plain, *arguments)
    counts = [count_flops(lambda *a, f=f: with_gradients(f, a), *arguments) for f in (ours, plain)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("expected", "dtype", "head_dim", "lengths", "capability"),
    [
        ("ours", "bfloat16", 64, (256, 256), 9.0),
        ("ours", "float16", 64, (512, 64), 9.0),
        ("cudnn", "bfloat16", 64, (256, 256), 8.0),
        ("cudnn", "bfloat16", 72, (256, 256), 9.0),
        ("cudnn", "bfloat16", 64, (256, 77), 9.0),
        ("cudnn", "bfloat16", 64, (1024, 256), 9.0),
        ("xla", "bfloat16", 64, (256, 16), 9.0),
        ("xla", "bfloat16", 256, (256, 256), 9.0),
        ("xla", "float32", 64, (256, 256), 9.0),
    ],
)
def test_which_kernels_attend(expected, dtype, head_dim, lengths, capability, monkeypatch):
    monkeypatch.setattr(forms, "CAPABILITY", capability)
    monkeypatch.setattr(norm, "has_kernel", lambda: True)
    assert attention_kernel(dtype, head_dim, *lengths) == expected
    monkeypatch.setattr(norm, "has_kernel", lambda: False)  # as with JAXDIFF_FORMS=plain
    assert attention_kernel(dtype, head_dim, *lengths) == {"ours": "cudnn"}.get(expected, expected)


def test_a_block_attends_by_them(monkeypatch):
    block, x = Attention(64, jnp.float32, zero_init=False), draw("x", 2, 8, 8, 128)
    params = jax.jit(block.init)(KEY, x)

    def gradients():
        return jax.jit(jax.grad(lambda params, x: jnp.square(block.apply(params, x).x).sum(), (0, 1)))(params, x)

    expected = gradients()
    monkeypatch.setattr(norm, "INTERPRET", True)
    monkeypatch.setattr(attention, "attention_kernel", lambda *_: "ours")
    assert "attention_gradient_of_keys" in str(jax.make_jaxpr(gradients)())
    for a, b in zip(jax.tree.leaves(gradients()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
