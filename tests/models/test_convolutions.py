"""3x3 convolutions with what is added to them: what surrounds the kernel, which nothing but a GPU runs."""

import functools
import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxdiff import mesh as meshes
from jaxdiff.models import convolution_kernels, convolutions, forms, mosaic, norm, products
from jaxdiff.models.attention import Attention
from jaxdiff.models.convolutions import (
    Added,
    Box,
    Cut,
    convolve_add,
    cut,
    each_product,
    has_kernel,
    product_add,
    reference,
)
from jaxdiff.models.layers import ResBlock, Upsample, upsample, upsample_convolve
from jaxdiff.models.norm import settle, sums_of
from jaxdiff.models.unet import REMAT, UNet
from jaxdiff.training.draws import draw_at_once
from jaxdiff.training.flops import count_flops

KEY = jax.random.key(0, impl="rbg")
HALF = jnp.dtype(jnp.bfloat16)


def draw(name, *shape, dtype="float32"):
    return jax.random.normal(jax.random.fold_in(KEY, sum(map(ord, name))), shape).astype(dtype)


def stand_in(shape, features, side, dtype, chosen, added, summed, blocks, parted=1):
    """What `convolution_kernels.build` returns, computed by XLA: sums over as many positions as a warpgroup has."""

    def run(x, kernel, *rest):
        rest = list(rest)
        bias = rest.pop(0) if added.bias else None
        residual = rest.pop(0) if added.residual else None
        parts, kernels = rest[: len(added.widths)], rest[len(added.widths) :]
        taps = (side,) * (4 if side == 2 else 2)
        y = reference(x, kernel.reshape(*taps, -1, features), bias, residual, parts, kernels)
        runs = y.astype(jnp.float32).reshape(-1, chosen.rows, features)
        sums = jnp.stack([runs.sum(axis=1), jnp.square(runs).sum(axis=1)], axis=1)
        return *jnp.split(y, parted, axis=-1), *[sums] * summed

    return run


@pytest.fixture
def kernels(monkeypatch):
    """As on a Hopper GPU, with norms run by the interpreter, and XLA in place of the kernel."""
    monkeypatch.setattr(norm, "has_kernel", lambda: True)
    monkeypatch.setattr(norm, "INTERPRET", True)
    monkeypatch.setattr(convolutions, "has_kernel", lambda x, *rest, **named: cut(x.shape, *rest, **named) is not None)
    monkeypatch.setattr(convolution_kernels, "build", stand_in)
    monkeypatch.setattr(forms, "CAPABILITY", 9.0)
    convolutions.call_kernel.clear_cache()
    yield
    convolutions.call_kernel.clear_cache()


def inputs(batch, side, width, features, widths, residual, dtype="float32"):
    x, kernel = draw("x", batch, side, side, width, dtype=dtype), draw("kernel", 3, 3, width, features) / 24
    other = draw("other", batch, side, side, features, dtype=dtype) if residual else None
    parts = tuple(draw(f"part{i}", batch, side, side, w, dtype=dtype) for i, w in enumerate(widths))
    matrices = tuple(draw(f"matrix{i}", w, features, dtype=dtype) / 8 for i, w in enumerate(widths))
    return x, kernel, draw("bias", features), other, parts, matrices


def with_gradients(function, arguments):
    def loss(arguments):
        y = function(*arguments)
        return (y.astype(jnp.float32) * draw("dy", *y.shape)).sum(), y

    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(arguments)
    return jax.tree.leaves((y, gradients))


@pytest.mark.parametrize(
    ("side", "width", "features", "widths", "residual"),
    [(16, 64, 128, (), False), (16, 128, 128, (), True), (8, 64, 128, (64, 128), False), (4, 128, 128, (64,), True)],
)
def test_gradients_are_those_of_the_reference(side, width, features, widths, residual, kernels):
    arguments = inputs(16, side, width, features, widths, residual)
    ours = with_gradients(lambda *a: convolve_add(*a)[0], arguments)
    for a, b in zip(ours, with_gradients(reference, arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max())


def test_sums_are_of_the_result(kernels):
    y, sums = convolve_add(*inputs(2, 32, 64, 128, (), True))
    assert cut((2, 32, 32, 64), 128).rows == 64 and sums.shape == (2, 8, 2, 128)
    np.testing.assert_allclose(sums[:, :, 0].sum(axis=1), y.sum(axis=(1, 2)), rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(sums[:, :, 1].sum(axis=1), jnp.square(y).sum(axis=(1, 2)), rtol=1e-4)
    assert convolve_add(*inputs(16, 8, 64, 128, (), True))[1] is None  # several images a tile


@pytest.mark.parametrize("side", [4, 8, 16])
def test_upsampled_map(side, kernels):
    """By four kernels, one for each second row and column; with sums where a tile is of one image."""
    x, kernel, *_ = inputs(16, side, 64, 128, (), False)
    ours = with_gradients(lambda *a: upsample_convolve(*a)[0], (x, kernel))
    expected = with_gradients(lambda x, kernel: reference(upsample(x), kernel), (x, kernel))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max())
    y, sums = upsample_convolve(x, kernel)
    assert (sums is None) == (side < 16)
    if sums is not None:
        assert sums.shape == (16, 8, 2, 128)
        np.testing.assert_allclose(sums[:, :, 0].sum(axis=1), y.sum(axis=(1, 2)), rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(sums[:, :, 1].sum(axis=1), jnp.square(y).sum(axis=(1, 2)), rtol=1e-4)


@pytest.mark.parametrize("side", [8, 16])
def test_product_with_what_is_added(side, kernels):
    x, _, bias, residual, _, (kernel,) = inputs(4, side, 64, 128, (64,), True)
    arguments = x, kernel, bias, residual
    ours = with_gradients(lambda *a: product_add(*a)[0], arguments)
    expected = with_gradients(
        lambda x, kernel, bias, residual: x @ kernel + bias[None, None, None] + residual, arguments
    )
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max())
    y, sums = product_add(*arguments)
    assert (sums is None) == (side < 16)
    if sums is not None:
        np.testing.assert_allclose(sums[:, :, 0].sum(axis=1), y.sum(axis=(1, 2)), rtol=1e-4, atol=1e-2)


def queries(side):
    """x [4, n, 64], three kernels for it, and two biases; the keys have none."""
    x, kernels = draw("x", 4, side * side, 64), tuple(draw(f"kernel{i}", 64, 128) / 8 for i in range(3))
    return x, kernels, (draw("bias0", 128), None, draw("bias2", 128))


@pytest.mark.parametrize("side", [8, 16])
def test_products_of_one_map(side, kernels):
    arguments = queries(side)
    ours = with_gradients(lambda *a: jnp.concatenate(each_product(*a), axis=-1), arguments)
    expected = with_gradients(lambda *a: jnp.concatenate(products.each_product(*a), axis=-1), arguments)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max())
    one = count_kernels(each_product, *arguments)
    assert one == 1 and count_kernels(each_product, arguments[0][:, :-8], *arguments[1:]) == 0  # of 56 or 248 positions


def count_kernels(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("name=call_kernel")


def test_attention_and_upsampling_leave_sums(kernels):
    """And both are what they are without kernels."""
    x = draw("x", 4, 16, 16, 128)
    layers = Attention(64, jnp.float32, zero_init=False), Upsample(128, jnp.float32)
    params = [layer.init(KEY, x) for layer in layers]
    found = [layer.apply(p, x) for layer, p in zip(layers, params, strict=True)]
    assert [sums_of(y).shape for y in found[:1]] + [found[1].sums.shape] == [(4, 2, 2, 128), (4, 8, 2, 128)]
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(norm, "has_kernel", lambda: False)
        plain.setattr(convolutions, "has_kernel", lambda *_, **__: False)
        for y, layer, p in zip(found, layers, params, strict=True):
            np.testing.assert_allclose(settle(y), settle(layer.apply(p, x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "features", "expected"),
    [
        ((512, 32, 32, 128), 128, Cut(128, 128, Box(1, 8, 32), 3, 3, 4)),
        ((512, 16, 16, 256), 256, Cut(128, 128, Box(1, 16, 16), 3, 3, 4)),
        ((64, 128, 128, 128), 128, Cut(128, 128, Box(1, 8, 32), 3, 3, 4)),
        ((64, 16, 16, 384), 384, Cut(64, 128, Box(1, 8, 16), 3, 3, 4)),  # 192 tiles for 132, or 384 smaller ones
        ((512, 8, 8, 256), 256, Cut(128, 128, Box(4, 8, 8), 1, 4, 4)),
        ((512, 4, 4, 256), 256, Cut(64, 128, Box(8, 4, 4), 1, 4, 4)),  # 64 tiles of 256 positions for 132
        ((64, 8, 8, 512), 512, Cut(64, 128, Box(2, 8, 8), 1, 4, 4)),
        ((64, 64, 4, 128), 128, Cut(64, 128, Box(1, 32, 4), 1, 3, 4)),  # rows of four, which no tap below begins with
        ((4, 4, 4, 256), 256, None),  # 64 positions
        ((512, 32, 32, 3), 128, None),
        ((512, 32, 32, 128), 192, None),
        ((8, 24, 24, 128), 128, None),
    ],
)
def test_how_the_kernel_is_cut(shape, features, expected, monkeypatch):
    monkeypatch.setattr(forms, "CAPABILITY", 9.0)
    assert cut(shape, features) == expected


def test_upsampling_has_four_times_the_tiles(monkeypatch):
    monkeypatch.setattr(forms, "CAPABILITY", 9.0)
    assert cut((512, 4, 4, 256), 256, side=2) == Cut(128, 128, Box(16, 4, 4), 1, 4, 4)
    assert cut((512, 16, 16, 256), 256, side=2) == Cut(128, 128, Box(1, 16, 16), 2, 3, 4)


@pytest.mark.parametrize(
    ("dtype", "capability", "expected"),
    [("bfloat16", 9.0, True), ("float16", 9.0, True), ("float32", 9.0, False), ("bfloat16", 8.0, False)],
)
def test_where_there_is_a_kernel(dtype, capability, expected, monkeypatch):
    monkeypatch.setattr(forms, "CAPABILITY", capability)
    x = jax.ShapeDtypeStruct((16, 16, 16, 64), dtype)
    assert has_kernel(x, 128) == expected
    monkeypatch.setenv("JAXDIFF_FORMS", "plain")
    assert not has_kernel(x, 128)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("shape", "features"),
    [((512, 32, 32, 128), 128), ((64, 64, 64, 256), 128), ((512, 16, 16, 512), 256), ((64, 16, 16, 384), 384)]
    + [((512, 8, 8, 256), 256), ((512, 4, 4, 256), 256), ((512, 64, 4, 128), 128), ((8, 32, 8, 128), 128)],
)
@pytest.mark.parametrize(
    ("side", "added", "parted"),
    [(3, Added(False, False, ()), 1), (3, Added(True, True, ()), 1), (3, Added(True, False, (256, 128)), 1)]
    + [(2, Added(False, False, ()), 1), (1, Added(True, True, ()), 1), (1, Added(True, False, ()), 3)],
)
def test_kernel_is_what_mosaic_takes(shape, features, side, added, parted, monkeypatch):
    """Its module, for an H100: all is of the right shape, and fits shared memory."""
    monkeypatch.setattr(forms, "CAPABILITY", 9.0)
    card = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=card)
    summed, features = parted == 1 and shape[1] * shape[2] >= 256, parted * features
    with jax.sharding.use_abstract_mesh(mesh):
        chosen = cut(shape, features, side, summed)
        run = convolution_kernels.build(shape, features, side, HALF, chosen, added, summed, 132, parted)
        of = functools.partial(jax.ShapeDtypeStruct, dtype=HALF)
        result = of((*shape[:3], features))
        arrays = [of(shape), of(({1: 1, 2: 16, 3: 9}[side] * shape[3], features))]
        arrays += [jax.ShapeDtypeStruct((features,), jnp.float32)] * added.bias + [result] * added.residual
        arrays += [of((*shape[:3], w)) for w in added.widths] + [of((w, features)) for w in added.widths]
        found = jax.eval_shape(run, *arrays)
    shaped = (shape[0] * shape[1], 2, shape[2], 2, features) if side == 2 else (*shape[:3], features // parted)
    assert [y.shape for y in found[:parted]] == [shaped] * parted and len(found) == parted + summed


def test_kernels_are_compiled_ahead_on_one_gpu(monkeypatch):
    """The first one at once, then by a thread, whatever goes wrong there."""
    compiled = []

    def compile_it(lowered):
        compiled.append(threading.current_thread() is threading.main_thread())
        if len(compiled) == 2:
            raise ValueError

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_it)
    monkeypatch.setattr(mosaic, "STARTED", threading.Event())

    def ask():
        mosaic.compile_ahead(jnp.sin, [jax.ShapeDtypeStruct((2,), jnp.float32)])

    ask()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ask()
    assert not compiled  # there are several devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for _ in range(4):
        ask()
    while mosaic.JOBS:
        time.sleep(0.01)
    assert compiled == [True, False, False, False]


def test_the_process_does_not_stay_for_kernels():
    script = """
import time, jax, jax.numpy as jnp
from jaxdiff.models import mosaic
jax.default_backend, mosaic.STARTED.is_set = lambda: "gpu", lambda: True
jax.stages.Lowered.compile = lambda lowered: time.sleep(1)
for _ in range(200):
    mosaic.compile_ahead(jnp.sin, [jax.ShapeDtypeStruct((2,), jnp.float32)])
print("end", len(mosaic.JOBS))
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and int(done.stdout.split()[1]) > 150


def test_initialisation_builds_no_kernels(monkeypatch):
    """It would for images whose results nobody uses."""
    built = []

    def build(*arguments):
        built.append(arguments)
        return stand_in(*arguments)

    block, x, emb = ResBlock(128, jnp.bfloat16), jnp.zeros((4, 16, 16, 128), jnp.bfloat16), jnp.zeros((4, 8))
    monkeypatch.setattr(forms, "CAPABILITY", 9.0)
    monkeypatch.setattr(convolution_kernels, "build", build)
    convolutions.call_kernel.clear_cache()
    shapes = jax.eval_shape(draw_at_once(lambda key: block.init(key, (x,), emb)), KEY)
    assert not built and norm.has_kernel()
    jax.eval_shape(lambda params: block.apply(params, (x,), emb), shapes)
    assert built
    convolutions.call_kernel.clear_cache()


def counted(monkeypatch, function, *arguments):
    """Multiplications without and with the kernel."""
    plain = count_flops(function, *arguments)
    monkeypatch.setattr(convolutions, "has_kernel", lambda *_, **__: True)
    monkeypatch.setattr(forms, "CAPABILITY", 9.0)
    card = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=card)
    with jax.sharding.use_abstract_mesh(mesh):
        return plain, count_flops(function, *arguments)


def test_multiplications_are_counted(monkeypatch):
    arguments = jax.tree.map(lambda a: a.astype(HALF), inputs(16, 16, 64, 128, (64, 128), False))
    plain, own = counted(monkeypatch, lambda *a: convolve_add(*a)[0], *arguments)
    assert own == plain


def test_multiplications_of_what_else_the_kernel_computes_are_counted(monkeypatch):
    x, kernel, bias, residual, _, (matrix,) = jax.tree.map(
        lambda a: a.astype(HALF), inputs(16, 16, 64, 128, (64,), True)
    )

    def both(*a):
        return upsample_convolve(*a[:2])[0], product_add(x, *a[2:])[0]

    plain, own = counted(monkeypatch, both, x, kernel, matrix, bias, residual)
    assert own == plain == 2 * 16 * 64 * 128 * (62**2 + 16**2)


@pytest.mark.parametrize("remat", ["none", "blocks", "dots"])
@pytest.mark.parametrize("features", [128, 256])
def test_residual_block_with_all_kernels_is_the_same(features, remat, kernels, monkeypatch):
    """Two of them, of which the second's norms take their sums from the convolutions before."""
    x, emb = draw("x", 2, 16, 16, 128), draw("emb", 2, 8)
    block = REMAT[remat](ResBlock, static_argnums=3)
    first, second = block(features, jnp.float32, zero_init=False), block(128, jnp.float32, scale_shift_norm=False)
    taken = []

    def loss(params, x):
        y, seen = first.apply(params[0], (x,), emb, True)
        taken.append(sums_of(y) is not None)
        z, (again, _) = second.apply(params[1], (y, seen[0]), emb, True)
        taken.append(sums_of(again) is not None)
        return sum((settle(m).astype(jnp.float32) * draw("w", *settle(m).shape)).sum() for m in (z, again))

    def gradient(params):
        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, x))

    with monkeypatch.context() as plain:
        plain.setattr(norm, "has_kernel", lambda: False)
        plain.setattr(convolutions, "has_kernel", lambda x, features: False)
        one = first.init(KEY, (x,), emb, True)
        params = one, second.init(KEY, (draw("y", 2, 16, 16, features), x), emb, True)
        params = jax.tree.map(lambda a: a + 0.05 * draw("noise", *a.shape), params)
        expected = gradient(params)
    assert not any(taken)
    taken.clear()
    for a, b in zip(gradient(params), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4 * np.abs(b).max())
    assert all(taken)


@pytest.mark.parametrize("resblock_updown", [False, True])
def test_unet_with_all_kernels_is_the_same(resblock_updown, kernels, monkeypatch):
    """And almost all norms of maps of 256 positions know the sums."""
    shape = {"channels": 128, "channel_mult": (1, 1), "num_res_blocks": 1, "resblock_updown": resblock_updown}
    network = UNet(3, **shape, scale_shift_norm=False, attention_resolutions=(16,), mid_attention=False)
    x, t = draw("x", 2, 16, 16, 3), jnp.array([3.0, 500.0])
    with monkeypatch.context() as plain:
        plain.setattr(norm, "has_kernel", lambda: False)
        plain.setattr(convolutions, "has_kernel", lambda *_, **__: False)
        params = jax.jit(network.init)(KEY, x, t)
        params = jax.tree.map(lambda a: a + 0.02 * draw("noise", *a.shape), params)
        expected = jax.jit(network.apply)(params, x, t)
    found, normalise = [], norm.normalise

    def spy(settings, parts, offset, p, q, owed=(), sums=()):
        found.append((parts[0].shape[1], len(parts), bool(sums)))
        return normalise(settings, parts, offset, p, q, owed, sums)

    monkeypatch.setattr(norm, "normalise", spy)
    np.testing.assert_allclose(jax.jit(network.apply)(params, x, t), expected, rtol=1e-3, atol=1e-3)
    middle = max(i for i, (positions, _, _) in enumerate(found) if positions == 64)
    down, up = (
        [known for positions, _, known in half if positions == 256] for half in (found[:middle], found[middle:])
    )
    assert down[0] is False and all(down[1:])  # what comes from the first convolution
    assert up[0] is False and all(up[1:]) and len(up) >= 7  # from 8x8, of which a tile has several images


@pytest.mark.parametrize("side", [16, 4])
def test_batch_that_is_split_over_devices(side, kernels):
    """Where a device has too few images for a tile it computes the reference."""
    x, *_, parts, matrices = inputs(16, side, 64, 128, (64,), False)
    kernel, bias = draw("kernel", 3, 3, 64, 128) / 24, draw("bias", 128)
    mesh = meshes.make_mesh()
    split, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)

    @jax.jit
    def run(x, kernel, bias, parts, matrices):
        return convolve_add(x, kernel, bias, None, parts, matrices), upsample_convolve(x, kernel)

    alone = run(x, kernel, bias, parts, matrices)
    everywhere = (jax.device_put(a, where) for a, where in ((x, split), (kernel, whole), (bias, whole)))
    parted = run(*everywhere, jax.device_put(parts, split), jax.device_put(matrices, whole))
    for (y, sums), scale in zip(parted, (1, 2), strict=True):  # nobody gathers the batch
        assert {s.data.shape for s in y.addressable_shards} == {(2, scale * side, scale * side, 128)}
        assert (sums is None) == (side == 4)
    for a, b in zip(jax.tree.leaves(parted), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
