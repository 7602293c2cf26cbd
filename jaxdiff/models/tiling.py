"""Decoding in parts, where memory is too short for all images, or for one image, at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Decode = Callable[[Float[Array, "batch hf wf z"]], Float[Array, "batch h w c"]]


def decode_in_parts(decode: Decode, z: Float[Array, "batch hf wf z"], batch_size: int) -> Float[Array, "batch h w c"]:
    """decode(z), computed for `batch_size` images (or all of fewer) at a time, one part after the other."""
    size = min(batch_size, len(z))
    # The last part is filled up. (`lax.map` by batches would be vmap, of which kernels of our own know nothing.)
    filled = jnp.pad(z, [(0, -len(z) % size), (0, 0), (0, 0), (0, 0)])
    images = jax.lax.map(decode, filled.reshape(-1, size, *z.shape[1:]))
    return images.reshape(-1, *images.shape[2:])[: len(z)]


def decode_tiled(decode: Decode, z: Float[Array, "batch hf wf z"], tile: int) -> Float[Array, "batch h w c"]:
    """decode(z), computed for one tile of tile x tile latent pixels after the other, blended linearly.

    Neighbours overlap by a quarter of a tile or more. Exact where one tile holds all; else the normalisation, attention
    and edges of a tile know nothing of what lies outside of it: the larger the tiles, the smaller the difference.
    """
    whole = jax.eval_shape(decode, z)
    factor = whole.shape[1] // z.shape[1]
    size = [min(tile, n) for n in z.shape[1:3]]
    if size == list(z.shape[1:3]):
        return decode(z)
    starts = [tile_starts(n, m) for n, m in zip(z.shape[1:3], size, strict=True)]
    shares = [tile_shares(corner * factor, m * factor, m // 4 * factor) for corner, m in zip(starts, size, strict=True)]
    tops, lefts = (axis.ravel() for axis in np.meshgrid(*map(np.arange, map(len, starts)), indexing="ij"))
    tiles: Any = (starts[0][tops], starts[1][lefts], shares[0][tops], shares[1][lefts])

    def add(image: Array, tile: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        top, left, rows, columns = tile
        part = decode(jax.lax.dynamic_slice(z, (0, top, left, 0), (len(z), *size, z.shape[3])))
        part = part * rows[None, :, None, None] * columns[None, None, :, None]
        corner = (0, top * factor, left * factor, 0)
        sofar = jax.lax.dynamic_slice(image, corner, part.shape)
        return jax.lax.dynamic_update_slice(image, sofar + part, corner), None

    return jax.lax.scan(add, jnp.zeros(whole.shape, whole.dtype), tiles)[0]


def tile_starts(size: int, tile: int) -> Int[np.ndarray, " n"]:
    """First indices of the fewest tiles that cover 0..size-1 evenly with overlaps of a quarter of a tile or more."""
    overlap = tile // 4
    count = 1 + max(0, -(-(size - tile) // (tile - overlap)))
    return np.linspace(0, size - tile, count).round().astype(np.int32)


def tile_shares(starts: Int[np.ndarray, " n"], tile: int, overlap: int) -> Float[np.ndarray, "n tile"]:
    """Weight of each tile at each of its indices: it falls linearly over the last `overlap` towards both ends.

    At every index the weights of all tiles there sum to 1.
    """
    ramp = np.minimum(np.arange(1, tile + 1) / (overlap + 1), 1)
    ramp = np.minimum(ramp, ramp[::-1])
    total = np.zeros(starts[-1] + tile)
    for start in starts:
        total[start : start + tile] += ramp
    return np.stack([ramp / total[start : start + tile] for start in starts]).astype(np.float32)
