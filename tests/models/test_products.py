"""The kernel that adds up products, run by Pallas's interpreter, against XLA's form of it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxdiff import mesh as meshes
from jaxdiff import startup
from jaxdiff.models import attention, forms, norm, product_kernels, products
from jaxdiff.models.attention import Attention
from jaxdiff.models.layers import ResBlock
from jaxdiff.models.products import Cut, add_products, cut, has_kernel, multiply, reference
from jaxdiff.training.flops import count_flops

KEY = jax.random.key(0, impl="rbg")
SMALL = Cut(rows=16, columns=128, chunks=2, tiles=1, warps=4, stages=2)


def draw(name, *shape, dtype="float32"):
    return jax.random.normal(jax.random.fold_in(KEY, sum(map(ord, name))), shape).astype(dtype)


def inputs(batch, positions, widths, features=128, dtype="float32"):
    parts = tuple(draw(f"part{i}", batch, positions, w, dtype=dtype) for i, w in enumerate(widths))
    return parts, tuple(draw(f"kernel{i}", w, features, dtype=dtype) / 8 for i, w in enumerate(widths))


def ours(*arguments):
    return multiply(True, *arguments)


def with_gradients(function, arguments):
    """The result, or several, and the gradients of a loss of them."""

    def loss(*arguments):
        ys = function(*arguments)
        each = enumerate(jax.tree.leaves(ys))
        return sum((y.astype(jnp.float32) * draw(f"dy{i}", *y.shape)).sum() for i, y in each), ys

    gradients, ys = jax.jit(jax.grad(loss, tuple(range(len(arguments))), has_aux=True))(*arguments)
    return jax.tree.leaves((ys, gradients))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(products, "cut", lambda widths, features: SMALL)


@pytest.fixture
def kernels(monkeypatch):
    """As on a GPU that has kernels, but run by the interpreter."""
    monkeypatch.setattr(norm, "has_kernel", lambda: True)
    monkeypatch.setattr(norm, "INTERPRET", True)
    monkeypatch.setattr(forms, "CAPABILITY", 9.0)


@pytest.mark.parametrize(
    ("positions", "widths", "features", "chosen"),
    [
        (64, (128, 64), 128, SMALL),
        (33, (64, 64), 256, SMALL),  # 66 rows; two tiles beside one another
        (50, (64, 64, 64), 128, SMALL._replace(tiles=3)),  # 100 rows: 7 tiles, of which the last block has one
        (50, (128, 64), 128, SMALL._replace(chunks=1, tiles=4)),
        (128, (256, 128), 128, None),
        (300, (64, 64), 128, None),
        (65, (256, 256), 256, None),
    ],
)
def test_kernel_is_the_reference(positions, widths, features, chosen, monkeypatch):
    if chosen:
        monkeypatch.setattr(products, "cut", lambda widths, features: chosen)
    arguments = inputs(2, positions, widths, features)
    for a, b in zip(with_gradients(ours, arguments), with_gradients(reference, arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chosen", [SMALL, SMALL._replace(chunks=1, tiles=2), None])
@pytest.mark.parametrize("widths", [(64,), (64, 128)])
def test_kernel_adds_a_bias_and_a_residual(widths, chosen, monkeypatch):
    if chosen:
        monkeypatch.setattr(products, "cut", lambda widths, features: chosen)
    arguments = [*inputs(2, 80, widths, 256), draw("bias", 256), draw("residual", 2, 80, 256)]
    for some in (arguments, [*arguments[:2], None, arguments[3]], arguments[:3]):
        for a, b in zip(with_gradients(ours, some), with_gradients(reference, some), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("own", [False, True])
def test_products_of_one_map(own, kernels, monkeypatch):
    """With the kernel for the gradient of the map, and without."""
    monkeypatch.setattr(products, "HALF", [jnp.dtype(jnp.float32)] if own else [])
    x, matrices = draw("x", 64, 64, 128), tuple(draw(f"kernel{i}", 128, 128) / 8 for i in range(3))
    biases = draw("bias", 128), None, None

    def plain(x, matrices, biases):
        first, *others = (x @ m for m in matrices)
        return first + biases[0][None, None], *others

    expected = with_gradients(plain, (x, matrices, biases))
    gradient = jax.grad(lambda x: sum(y.sum() for y in products.each_product(x, matrices, biases)))
    assert ("sum_of_products" in str(jax.make_jaxpr(gradient)(x))) == own
    for a, b in zip(with_gradients(products.each_product, (x, matrices, biases)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(("rows", "tiles"), [(16, 1), (17, 1), (100, 3), (500, 16)])
def test_tiles_are_all_rows_and_no_others(rows, tiles):
    """Which the interpreter, that moves what would be outside, does not tell."""
    chosen = SMALL._replace(tiles=tiles)
    blocks, steps = np.mgrid[: -(-rows // (16 * tiles)), :tiles]
    computed = np.asarray(product_kernels.start(chosen, blocks, steps, rows))[..., None] + np.arange(16)
    assert set(computed.ravel()) == set(range(rows))


@pytest.mark.parametrize("chunks", [1, 2])
def test_kernel_rounds_once(chunks, monkeypatch):
    monkeypatch.setattr(products, "cut", lambda widths, features: SMALL._replace(chunks=chunks))
    arguments = inputs(2, 40, (64, 64), dtype="bfloat16")
    y, *gradients = with_gradients(ours, arguments)
    exact = reference(*jax.tree.map(lambda a: a.astype(jnp.float32), arguments))
    assert y.dtype == jnp.bfloat16
    assert (np.abs(y.astype(np.float32) - exact) <= 2**-8 * np.abs(exact) + 1e-5).all()
    for a, b in zip(gradients, with_gradients(reference, arguments)[1:], strict=True):
        np.testing.assert_array_equal(a, b)  # XLA's own


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("widths", "features"),
    [((128, 128), 128), ((256, 128), 128), ((256, 256), 256), ((512, 256), 384), ((256,), 256), ((256,) * 3, 256)],
)
def test_kernel_is_what_triton_takes(widths, features):
    parts = tuple(jax.ShapeDtypeStruct((8, 1024, width), jnp.bfloat16) for width in widths)
    kernels = tuple(jax.ShapeDtypeStruct((width, features), jnp.bfloat16) for width in widths)
    bias = jax.ShapeDtypeStruct((features,), jnp.float32)
    residual = jax.ShapeDtypeStruct((8, 1024, features), jnp.bfloat16)
    card = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")  # which JAX asks for since 0.11
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=card)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda *a: multiply(False, *a)).trace(parts, kernels, bias, residual)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "sum_of_products" in text


@pytest.mark.parametrize("positions", [16, 8])
def test_kernel_of_a_batch_that_is_split_over_devices(positions, small):
    """Where a device has fewer rows than a tile it computes the reference."""
    parts, kernels = inputs(8, positions, (64, 64))
    mesh = meshes.make_mesh()
    split, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    everywhere = jax.device_put(parts, split), jax.device_put(kernels, whole)
    alone, parted = (with_gradients(ours, a) for a in ((parts, kernels), everywhere))
    assert {s.data.shape for s in parted[0].addressable_shards} == {(1, positions, 128)}  # nobody gathers the batch
    for a, b in zip(parted, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_programs_of_several_devices_are_found_again_and_not_mistaken(monkeypatch):
    sharding = meshes.batch_sharding(meshes.make_mesh())
    parts = [jax.ShapeDtypeStruct((8, 16, 64), jnp.float32, sharding=sharding)] * 2
    kernels = [jax.ShapeDtypeStruct((64, 128), jnp.float32)] * 2

    def key(**fields):
        function = jax.jit(lambda *a: product_kernels.multiply(SMALL._replace(**fields), True, *a, None, None))
        text = function.lower(tuple(parts), tuple(kernels)).as_text()
        return re.sub(r'backend_config = "[0-9]+"', "", text)  # the pointer, which the cache leaves out

    monkeypatch.setattr(meshes, "initialize_distributed", lambda: None)
    startup.start()
    assert key() == key()
    assert len({key(), key(tiles=2), key(chunks=1)}) == 3


def test_residual_block_is_the_same(kernels, monkeypatch):
    parts = draw("x", 4, 32, 32, 64, dtype="bfloat16"), draw("other", 4, 32, 32, 64, dtype="bfloat16")
    emb, block, calls = draw("emb", 4, 8), ResBlock(256, jnp.bfloat16), []
    params = jax.jit(lambda: block.init(KEY, tuple(part[:1] for part in parts), emb[:1]))()

    def counted(*arguments):
        calls.append(arguments)
        return multiply(*arguments)

    def gradient():
        def loss(params, parts):
            y, _ = block.apply(params, parts, emb)
            return (norm.settle(y).astype(jnp.float32) * draw("w", 4, 32, 32, 256)).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, parts)

    monkeypatch.setattr(norm, "normalise", norm.reference)
    monkeypatch.setattr(products, "multiply", counted)
    fast = jax.tree.leaves(gradient())
    assert calls
    calls.clear()
    monkeypatch.setattr(products, "has_kernel", lambda *_: False)
    for a, b in zip(fast, jax.tree.leaves(gradient()), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) <= 0.01 * np.linalg.norm(b)
    assert not calls


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_is_the_same(qk_norm, kernels, monkeypatch):
    monkeypatch.setattr(norm, "normalise", norm.reference)
    monkeypatch.setattr(attention, "attention_kernel", lambda *_: "xla")
    block, x = Attention(64, jnp.bfloat16, zero_init=False, qk_norm=qk_norm), draw("x", 64, 8, 8, 128, dtype="bfloat16")
    params = jax.jit(lambda: block.init(KEY, x[:1]))()
    params = jax.tree.map(lambda p: p + 0.1 * draw("noise", *p.shape), params)
    calls = []

    def counted(interpret, parts, *arguments):
        calls.append(len(parts))
        return multiply(interpret, parts, *arguments)

    def gradient():
        def loss(params, x):
            y = norm.settle(block.apply(params, x)).astype(jnp.float32)
            return (y * draw("w", *x.shape)).sum(), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    monkeypatch.setattr(products, "multiply", counted)
    fast = jax.tree.leaves(gradient())
    assert set(calls) == {1, 3}  # what follows attention, and the gradient of queries, keys and values
    monkeypatch.setattr(products, "has_kernel", lambda *_: False)
    for a, b in zip(fast, jax.tree.leaves(gradient()), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(b)


def test_a_residual_of_another_dtype_is_left_to_xla(kernels):
    parts, matrices = inputs(2, 4096, (64, 64), dtype="bfloat16")
    residual = draw("residual", 2, 4096, 128)
    y = jax.eval_shape(lambda *a: add_products(*a, None, residual), parts, matrices)
    assert y.dtype == jnp.float32


def test_kernel_is_for_large_maps_on_hopper(kernels, monkeypatch):
    def asked(shape=(4, 32, 32), widths=(128, 128), features=128, dtype=jnp.bfloat16):
        return has_kernel([jax.ShapeDtypeStruct((*shape, width), dtype) for width in widths], features)

    assert asked() and asked(widths=(256, 128)) and asked(widths=(128,) * 3, dtype=jnp.float16)
    assert asked(widths=(256,)) and not asked(shape=(3, 32, 32)) and not asked(dtype=jnp.float32)
    assert not asked(features=192) and not asked(widths=(96, 96)) and not asked(widths=(512, 384))
    monkeypatch.setattr(forms, "CAPABILITY", 8.0)
    assert not asked()
    monkeypatch.setattr(forms, "CAPABILITY", 9.0)
    monkeypatch.setattr(norm, "has_kernel", lambda: False)
    assert not asked()


@pytest.mark.parametrize(
    ("widths", "features"),
    [((128, 128), 128), ((256, 128), 256), ((256, 256), 512), ((1024, 512), 768), ((256,), 256), ((256,) * 3, 256)],
)
def test_shared_memory_is_enough(widths, features):
    chosen, channels = cut(widths, features), sum(widths)
    assert features % chosen.columns == 0
    depth, half = channels // chosen.chunks, 2
    step = depth * chosen.rows * half * chosen.stages
    kernels = depth * chosen.columns * half * (1 if chosen.chunks == 1 else chosen.stages)
    result = chosen.rows * chosen.columns * half  # in shared memory on its way out, with what lives until then
    assert step + kernels + (result if chosen.tiles > 1 else 0) <= 227 * 1024


def test_operations_are_those_of_the_reference(kernels):
    """Of odd numbers of rows too, of which some are computed twice."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((5, 29, 31, 128), (5, 29, 31, 64))]
    weights = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((128, 128), (64, 128))]

    def loss(parts, kernels):
        return (add_products(parts, kernels).astype(jnp.float32) ** 2).sum()

    once = 2 * 5 * 29 * 31 * 192 * 128
    assert has_kernel(shapes, 128)
    assert "pallas_call" in str(jax.make_jaxpr(add_products)(shapes, weights))
    assert count_flops(add_products, shapes, weights) == once
    assert count_flops(jax.value_and_grad(loss, (0, 1)), shapes, weights) == 3 * once
    assert count_flops(jax.value_and_grad(jax.checkpoint(loss), (0, 1)), shapes, weights) == 3 * once
