"""Decoding in parts: the same images, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import images
from jaxdiff.models import AutoencoderKL, decode_in_parts, decode_tiled, norm
from jaxdiff.models.tiling import tile_shares, tile_starts


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def decode():
    model = AutoencoderKL(2, 4, (1, 2), 1, norm_groups=2)
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 4, 4, 2)))
    leaves, structure = jax.tree.flatten(abstract)
    params = jax.tree.unflatten(structure, [0.3 * normal(*leaf.shape) for leaf in leaves])
    return lambda z: model.apply(params, z, method="decode")


def compiled(function, z):
    """The result, and the bytes that the program takes beside its arguments and its result."""
    program = jax.jit(function).lower(z).compile()
    return np.asarray(program(z)), program.memory_analysis().temp_size_in_bytes


def test_in_parts_the_images_are_the_same_and_the_memory_is_less(decode):
    z = normal(8, 8, 8, 2)
    whole, memory = compiled(decode, z)
    for batch_size in (1, 3, 100):
        out, less = compiled(lambda z, n=batch_size: decode_in_parts(decode, z, n), z)
        np.testing.assert_allclose(out, whole, atol=1e-6)
        assert batch_size == 100 or less < memory * (0.3 if batch_size == 1 else 0.6)


def test_in_parts_with_kernels_of_our_own(decode, monkeypatch):
    z = normal(3, 8, 8, 2)
    whole = np.asarray(decode(z))
    monkeypatch.setattr(norm, "has_kernel", lambda: True)
    monkeypatch.setattr(norm, "INTERPRET", True)
    np.testing.assert_allclose(jax.jit(lambda z: decode_in_parts(decode, z, 2))(z), whole, rtol=1e-4, atol=1e-4)


def test_one_tile_is_the_whole_image(decode):
    z = normal(2, 8, 6, 2)
    np.testing.assert_array_equal(compiled(lambda z: decode_tiled(decode, z, 8), z)[0], compiled(decode, z)[0])


def test_tiles_of_a_local_decoder_differ_at_their_edges_alone():
    """A pixel depends on the next ones only, and the edge of a tile hardly counts where another tile overlaps it."""

    def local(z):
        x = z.repeat(2, axis=1).repeat(2, axis=2)
        return x + 0.5 * jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]

    z = normal(2, 21, 8, 3)  # several tiles down, one across
    whole, tiled = np.asarray(local(z)), np.asarray(decode_tiled(local, z, 8))
    changed = np.flatnonzero(np.abs(tiled - whole).max(axis=(0, 2, 3)) > 1e-5)
    assert changed.tolist() == [2 * start for start in tile_starts(21, 8)[1:]]
    assert np.abs(tiled - whole).max() < 0.25 * np.abs(whole).max()
    untouched = decode_tiled(lambda z: z.repeat(2, axis=1).repeat(2, axis=2), z, 8)
    np.testing.assert_allclose(untouched, z.repeat(2, axis=1).repeat(2, axis=2), atol=1e-6)


def test_larger_tiles_are_nearer_to_the_whole_and_take_less_memory(decode):
    z = normal(1, 32, 32, 2)
    whole, memory = compiled(decode, z)
    psnr = []
    for tile in (8, 24):
        out, less = compiled(lambda z, n=tile: decode_tiled(decode, z, n), z)
        psnr.append(float(images.psnr(out, whole)[0]))
        assert less < memory * 0.7
    assert 30 < psnr[0] < psnr[1] and psnr[1] > 45, psnr


@pytest.mark.parametrize(("size", "tile"), [(8, 8), (9, 8), (16, 8), (64, 8), (33, 15), (128, 64)])
def test_tiles_cover_evenly_and_their_shares_sum_to_one(size, tile):
    starts = tile_starts(size, tile)
    assert starts[0] == 0 and starts[-1] == size - tile
    steps = np.diff(starts)
    assert (steps > 0).all() and (steps <= tile - tile // 4).all() and (not len(steps) or np.ptp(steps) <= 1)
    shares, total = tile_shares(starts, tile, tile // 4), np.zeros(size)
    for start, share in zip(starts, shares, strict=True):
        total[start : start + tile] += share
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert (shares > 0).all()


def test_overlaps_are_blended_linearly():
    first, second = tile_shares(np.array([0, 6]), 8, 2)
    np.testing.assert_allclose(first, [1] * 6 + [2 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(second, [1 / 3, 2 / 3] + [1] * 6, rtol=1e-6)
