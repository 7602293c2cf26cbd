"""GroupNorm: our kernels, run by Pallas's interpreter, against XLA's form of it; and that against Flax's."""

import re
import sys
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxdiff import mesh as meshes
from jaxdiff import startup
from jaxdiff.models import norm, norm_tiles
from jaxdiff.models.layers import ResBlock
from jaxdiff.models.norm import BiasAdded, GroupNorm, Norm, add_bias, normalise, reference, settle
from jaxdiff.models.unet import REMAT

KEY = jax.random.key(0, impl="rbg")


def draw(name, *shape, dtype="float32"):
    return jax.random.normal(jax.random.fold_in(KEY, sum(map(ord, name))), shape).astype(dtype)


def inputs(batch, positions, widths, offset, dtype="float32", owing=()):
    channels = sum(widths)
    parts = tuple(0.5 + 2 * draw(f"part{i}", batch, positions, w, dtype=dtype) for i, w in enumerate(widths))
    p, q = 1 + 0.3 * draw("p", batch, channels), 0.3 * draw("q", batch, channels)
    owed = tuple(draw("owed", w) if i in owing else None for i, w in enumerate(widths)) if owing else ()
    return parts, draw("offset", batch, channels) if offset else None, p, q, owed


def compute(function, settings, arguments, kept):
    """y, and the gradients of a loss of it and of the first `kept` of the parts, of which one is used again."""

    def loss(parts, offset, p, q, owed):
        y, parts, again, _ = function(settings, parts, offset, p, q, owed)
        total = (y.astype(jnp.float32) * draw("dy", *y.shape)).sum()
        if kept:
            total += sum((x.astype(jnp.float32) * draw("kept", *x.shape)).sum() for x in parts[:kept])
            total += (again[-1].astype(jnp.float32) * draw("again", *again[-1].shape)).sum()
        return total, y

    wanted = (0, 2, 3, 4) if arguments[1] is None else (0, 1, 2, 3, 4)
    gradients, y = jax.jit(jax.grad(loss, wanted, has_aux=True))(*arguments)
    return y, gradients


@pytest.mark.parametrize(
    ("positions", "widths", "groups", "offset", "silu", "kept", "owing"),
    [
        (256, (64,), 32, True, True, 1, (0,)),
        (36, (48,), 16, True, False, 0, (0,)),  # as many rows as no tile has
        (64, (64, 32), 32, False, True, 2, ()),  # a group has channels of both parts; 3 of each
        (16, (20, 4), 4, True, True, 1, (1,)),  # fewer channels than a block is wide
        (20, (130, 62), 16, True, True, 2, (0, 1)),  # blocks of one part, and of both, in pieces
        (20, (40, 56, 32), 8, False, True, 0, (0, 2)),
    ],
)
def test_kernels_are_the_reference(positions, widths, groups, offset, silu, kept, owing):
    settings = Norm(groups, 1e-5, silu, jnp.dtype("float32"), interpret=True)
    arguments = inputs(2, positions, widths, offset, owing=owing)
    ours, theirs = (compute(f, settings, arguments, kept) for f in (normalise, reference))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * np.abs(b).max())
    for part, sums in zip(arguments[0], normalise(settings, *arguments)[-1], strict=True):
        expected = jnp.stack([part.sum(axis=1), jnp.square(part).sum(axis=1)], axis=1)
        np.testing.assert_allclose(sums, expected[:, None], rtol=1e-4, atol=1e-3)


def lower(positions, widths):
    """Both kernels as they go to XLA for an H100."""
    settings = Norm(8, 1e-5, True, jnp.dtype("bfloat16"))
    parts = tuple(jax.ShapeDtypeStruct((2, positions, width), jnp.bfloat16) for width in widths)
    vector = jax.ShapeDtypeStruct((2, sum(widths)), jnp.float32)
    owed = (jax.ShapeDtypeStruct(widths[:1], jnp.float32), *[None] * (len(widths) - 1))

    def loss(*arguments):
        y, parts, again, _ = normalise(settings, *arguments)
        return sum(x.astype(jnp.float32).sum() for x in (y, *parts, again[0]))

    card = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")  # which JAX asks for since 0.11
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=card)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))).trace(parts, vector, vector, vector, owed)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("positions", "widths"), [(16384, (128,)), (1024, (256, 128)), (81, (384,)), (16, (64,)), (256, (32, 8))]
)
def test_kernels_are_what_triton_takes(positions, widths):
    text = lower(positions, widths)
    assert text.count("group_norm_forward") and text.count("group_norm_backward")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_lowering_finds_the_module_of_tritons_dialect(monkeypatch):
    """Or MLIR looks for it thousands of times."""
    names = []
    finder = SimpleNamespace(find_spec=lambda name, *_: names.append(name))
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    assert "group_norm_forward" in lower(64, (96,)) and not [name for name in names if name.endswith(".tt")]


@pytest.mark.parametrize("cut", [(512, 16, 16), (256, 8, 16, 2), (4096, 8, 16)])
def test_kernels_cut_otherwise_are_the_same(cut, monkeypatch):
    monkeypatch.setattr(norm_tiles, "tuning", lambda *shape: norm_tiles.Tuning(*cut))
    settings = Norm(8, 1e-5, True, jnp.dtype("float32"), interpret=True)
    parts, offset, p, q, owed = inputs(2, 100, (32,), True, owing=(0,))
    arguments = parts, offset[:1], p, q[:1], owed  # of all images
    ours, theirs = (compute(f, settings, arguments, 1) for f in (normalise, reference))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * np.abs(b).max())


def test_kernels_round_only_what_they_return():
    settings = Norm(16, 1e-5, True, jnp.dtype("bfloat16"), interpret=True)
    arguments = inputs(1, 64, (64,), False, dtype="bfloat16")
    ours = compute(normalise, settings, arguments, kept=1)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), arguments)
    exact = compute(reference, settings._replace(dtype=jnp.dtype("float32")), wide, kept=1)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        assert np.abs(a.astype(np.float32) - b).max() <= 2**-8 * np.abs(b).max()


@pytest.mark.parametrize(
    ("positions", "widths", "groups", "offset", "counts"),
    [
        (48, (16,), 4, False, (3,)),
        (64, (16, 8), 8, True, (2, 1)),
        (2048, (64,), 8, False, (4,)),
        (33, (24,), 4, True, (1,)),
    ],
)
def test_kernels_whose_sums_are_known(positions, widths, groups, offset, counts):
    settings = Norm(groups, 1e-5, True, jnp.dtype("float32"), interpret=True)
    parts, *others = inputs(2, positions, widths, offset)

    def sums(x, count):
        runs = x.reshape(2, count, -1, x.shape[-1])
        return jnp.stack([runs.sum(axis=2), jnp.square(runs).sum(axis=2)], axis=2)

    known = tuple(sums(x, count) for x, count in zip(parts, counts, strict=True))
    arguments = parts, *others
    ours = compute(lambda norm, *a: normalise(norm, *a, known), settings, arguments, kept=1)
    for a, b in zip(
        jax.tree.leaves(ours), jax.tree.leaves(compute(reference, settings, arguments, kept=1)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    wrong = tuple(2 * s for s in known)
    ours, *_ = compute(lambda norm, *a: normalise(norm, *a, wrong), settings, arguments, kept=1)
    assert normalise(settings, *arguments, known)[-1] == ()
    assert np.abs(ours - reference(settings, *arguments)[0]).max() > 0.1  # nothing is summed again


@pytest.mark.parametrize("shared", [False, True])
def test_kernels_of_a_batch_that_is_split_over_devices(shared):
    settings = Norm(8, 1e-5, True, jnp.dtype("float32"), interpret=True)
    parts, *vectors, owed = inputs(8, 16, (16,), True, owing=(0,))
    arguments = parts, *(v[:1] if shared else v for v in vectors), owed
    mesh = meshes.make_mesh()
    split, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)
    everywhere = jax.tree.map(
        lambda a: jax.device_put(a, whole if a.shape[0] == 1 or a.ndim == 1 else split), arguments
    )
    whole, parted = (compute(normalise, settings, a, kept=0) for a in (arguments, everywhere))
    assert len({s.data.shape for s in parted[0].addressable_shards}) == 1
    assert parted[0].addressable_shards[0].data.shape == (1, 16, 16)  # nobody gathers the batch
    for a, b in zip(jax.tree.leaves(parted), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_kernels_in_a_block_that_is_computed_again(monkeypatch):
    parts, emb = (draw("x", 2, 4, 4, 16), draw("other", 2, 4, 4, 8)), draw("emb", 2, 8)
    block = REMAT["blocks"](ResBlock, static_argnums=3)(16, jnp.bfloat16, scale_shift_norm=False, norm_groups=8)
    params = jax.tree.map(lambda a: a + 0.1 * draw("noise", *a.shape), block.init(KEY, parts, emb, True))

    def gradient(block):
        def loss(params, parts):
            y, _ = block.apply(params, parts, emb, True)
            return (settle(y).astype(jnp.float32) * draw("w", 2, 4, 4, 16)).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, parts)

    exact = gradient(block.clone(dtype=jnp.float32))
    monkeypatch.setattr(norm, "has_kernel", lambda: True)
    monkeypatch.setattr(norm, "INTERPRET", True)
    for a, b in zip(jax.tree.leaves(gradient(block)), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(a - b) <= 0.03 * np.linalg.norm(b)  # bfloat16


def test_programs_of_several_devices_are_found_again_and_not_mistaken(monkeypatch):
    sharding = meshes.batch_sharding(meshes.make_mesh())
    x, p = (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in ((8, 4, 8), (8, 8)))

    def key(**fields):
        settings = Norm(4, 1e-5, True, jnp.dtype("float32"), interpret=True)._replace(**fields)
        text = jax.jit(lambda x, p: normalise(settings, (x,), None, p, p)[0]).lower(x, p).as_text()
        return re.sub(r'backend_config = "[0-9]+"', "", text)  # the pointer, which the cache leaves out

    monkeypatch.setattr(meshes, "initialize_distributed", lambda: None)
    startup.start()
    assert jax.config.jax_remove_custom_partitioning_ptr_from_cache_key
    assert key() == key()
    assert len({key(), key(silu=False), key(eps=1e-6), key(groups=2)}) == 4


@pytest.mark.parametrize("kernels", [False, True])
def test_module_is_that_of_flax(kernels, monkeypatch):
    if kernels:
        monkeypatch.setattr(norm, "has_kernel", lambda: True)
        monkeypatch.setattr(norm, "INTERPRET", True)
    x, other = draw("x", 2, 4, 4, 12), draw("other", 2, 4, 4, 4)
    scale, shift, offset = draw("scale", 2, 16), draw("shift", 2, 16), draw("offset", 16)[None]
    ours, flax = GroupNorm(32, 1e-5, jnp.float32, silu=True), nn.GroupNorm(16, epsilon=1e-5)
    params = {"params": {"scale": draw("gamma", 16), "bias": draw("beta", 16)}}  # gcd(32, 16) groups
    assert jax.tree.map(jnp.shape, ours.init(KEY, (x, other))) == jax.tree.map(jnp.shape, params)
    y, parts, _ = ours.apply(params, (x, other), offset, scale, shift)
    both = jnp.concatenate([x, other], axis=-1) + offset[:, None, None]
    expected = flax.apply(params, both) * (1 + scale[:, None, None]) + shift[:, None, None]
    np.testing.assert_allclose(y, nn.silu(expected), rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(parts[1], other)


def test_kernels_are_for_gpus_and_can_be_refused(monkeypatch):
    class Device:
        compute_capability = "9.0"

    monkeypatch.setattr(jax, "local_devices", lambda: [Device])
    assert not norm.has_kernel()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert norm.has_kernel()
    monkeypatch.setattr(Device, "compute_capability", "7.5")
    assert not norm.has_kernel()
    monkeypatch.setattr(Device, "compute_capability", "9.0")
    monkeypatch.setenv("JAXDIFF_FORMS", "plain")
    assert not norm.has_kernel()


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("by", ["a norm", "settle"])
def test_what_is_owed_is_the_gradient_of_a_bias_that_is_added(by, kernels, monkeypatch):
    monkeypatch.setattr(norm, "has_kernel", lambda: kernels)
    monkeypatch.setattr(norm, "INTERPRET", True)
    x, bias, module = draw("x", 2, 4, 4, 16), draw("bias", 16), GroupNorm(4, 1e-5, jnp.float32)
    params = module.init(KEY, (x,))

    def loss(bias, owing):
        h = BiasAdded(add_bias(x, jax.lax.stop_gradient(bias)), bias) if owing else add_bias(x, bias)
        if by == "settle":
            h = settle(h)
        y, (h,), ((again, _),) = module.apply(params, (h,))  # and everyone else uses what that returns
        return (draw("w", *y.shape) * (y + h**2 + again**3)).sum()

    values, gradients = zip(*(jax.value_and_grad(loss)(bias, owing) for owing in (True, False)), strict=True)
    np.testing.assert_allclose(*values)
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-4)
