"""GroupNorm, with what `norm.GroupNorm` has around it, as two GPU kernels, written in Pallas and lowered by Triton.

A block of threads has some groups of one image. Forward, it sums over their positions, and reads them again for y;
backward likewise, where the first sums are the gradients of scale and shift.
"""

import functools
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from jaxdiff.models import norm_tiles, splitting
from jaxdiff.models.norm import Norm, Sums
from jaxdiff.models.norm_tiles import Blocks, Piece, Tiles, cut, each_place, over, segments_of

SOURCE = [zlib.crc32(pathlib.Path(str(file)).read_bytes()) for file in (__file__, norm_tiles.__file__)]


def forward(
    norm: Norm, parts: Sequence[Array], offset: Array | None, p: Array, q: Array, sums: Sequence[Sums] = ()
) -> tuple[Array, list[Array], list[Sums]]:
    """y [B, N, C]; [B, C] of each channel: its group's mean and 1 / standard deviation, and maybe its own mean; sums.

    A channel's own mean with an offset only, the parts' sums unless they are known. See `norm.normalise`.
    """
    blocks = cut(parts[0].shape[1], sum(part.shape[-1] for part in parts), norm.groups, False, bool(sums))
    y, *rest = _forward(norm, blocks, tuple(parts), offset, p, q, tuple(sums))
    count = 2 if offset is None else 3
    return y, rest[:count], rest[count:]


# Jitted, here and below, so that norms of the same shapes are traced and lowered once for all of them.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(
    norm: Norm,
    blocks: Blocks,
    parts: tuple[Array, ...],
    offset: Array | None,
    p: Array,
    q: Array,
    sums: tuple[Sums, ...],
) -> Any:
    widths, (batch, positions, _) = [part.shape[-1] for part in parts], parts[0].shape
    count, of_channels = len(parts), 2 if offset is None else 3
    segments = segments_of(blocks, positions) if sums else 1

    def group_norm_forward(*refs: Any) -> None:
        each_place(blocks, widths, functools.partial(body, refs))

    def body(refs: Any, pieces: list[Piece], place: Any) -> None:
        (y_ref, *stats_refs), refs = refs[-len(outputs) :], refs[: -len(outputs)]
        sums_refs, refs = (refs[-count:], refs[:-count]) if sums else (None, refs)
        *inputs, p_ref, q_ref = refs
        tiles = Tiles(norm, blocks, pieces, place, positions)
        steps = tiles.steps // segments
        start = pl.program_id(2) * steps if segments > 1 else 0
        shift = tiles.vector(inputs[count]) if offset is not None else [jnp.zeros(piece.size) for piece in pieces]

        def read(step: Any) -> list[Array]:
            return tiles.load(inputs[:count], start + step)

        def moments(step: Any, tile: list[Array]) -> list[list[Array]]:
            x = over(lambda t: t.astype(jnp.float32), tile)
            return [x, over(jnp.square, x)]

        def about(square: Array, total: Array, own: Array, mean: Array) -> Array:
            """The sum of squared differences from `mean`: of those from the channel's own, and of that."""
            return square - total * total / positions + positions * jnp.square(own - mean)

        def scaled(x: Array, slope: Array, constant: Array) -> Array:
            u = x.astype(jnp.float32) * slope[None, :] + constant[None, :]
            return u * tiles.sigmoid(u) if norm.silu else u

        # What comes next is under way before the threads wait for each other to sum: these, and the first tile again.
        if sums_refs is None:
            totals, tile = tiles.sums(read, moments, 2, wrap=True)
        else:
            totals, tile = tiles.load_sums(sums_refs), read(0)
        vectors = tiles.vector(p_ref), tiles.vector(q_ref)
        total, square = tiles.over_rows(totals)
        if sums_refs is None:
            tiles.store_sums(stats_refs[-count:], total, square)
        own = over(lambda total, shift: total / positions + shift, total, shift)
        mean = tiles.group_mean(over(lambda own: positions * own, own))
        squares = tiles.group_mean(over(about, square, total, own, mean))
        inv = over(lambda square: jax.lax.rsqrt(jnp.maximum(square, 0.0) + norm.eps), squares)
        for ref, values in zip(stats_refs[:of_channels], (mean, inv, own), strict=False):
            tiles.store_vector(ref, values)
        slope = over(jnp.multiply, inv, vectors[0])
        constant = over(lambda q, s, m, a: q + (s - m) * a, vectors[1], shift, mean, slope)

        def write(step: Any, tile: list[Array]) -> list[list[Array]]:
            tiles.store(y_ref, start + step, over(scaled, tile, slope, constant))
            return []

        tiles.sums(read, write, 0, tile, steps=steps)

    stats = jax.ShapeDtypeStruct((batch, sum(widths)), jnp.float32)
    y = jax.ShapeDtypeStruct((batch, positions, sum(widths)), norm.dtype)
    inputs = [*parts, *([] if offset is None else [offset]), p, q, *sums]
    outputs = [y, *[stats] * of_channels]
    if not sums:
        outputs += [jax.ShapeDtypeStruct((batch, 1, 2, width), jnp.float32) for width in widths]
    return _call(group_norm_forward, norm, blocks, inputs, outputs, segments)


def backward(
    norm: Norm,
    dy: Array,
    kept: Sequence[Sequence[Array | None]],
    parts: Sequence[Array],
    offset: Array | None,
    p: Array,
    q: Array,
    stats: Sequence[Array],
    total: bool = False,
) -> tuple[list[Array], Float[Array, "b rows c"]]:
    """Gradients of the parts, and each image's for p, q and the offset, where there is one, in one array.

    `stats` is what `forward` returned. `kept` has, of each other use of the parts, their gradients, which are added.
    With `total` the array's last row is the sum over the positions of the parts' gradients.
    """
    _, positions, channels = dy.shape
    blocks = cut(positions, channels, norm.groups, backward=True)
    arrays = dy, tuple(map(tuple, kept)), tuple(parts), offset, p, q, tuple(stats)
    *dparts, rows = _backward(norm, blocks, total, *arrays)
    return dparts, rows


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _backward(
    norm: Norm,
    blocks: Blocks,
    total: bool,
    dy: Array,
    kept: tuple[tuple[Array | None, ...], ...],
    parts: tuple[Array, ...],
    offset: Array | None,
    p: Array,
    q: Array,
    stats: tuple[Array, ...],
) -> Any:
    widths, (batch, positions, channels) = [part.shape[-1] for part in parts], dy.shape
    count = len(parts)

    def group_norm_backward(*refs: Any) -> None:
        each_place(blocks, widths, functools.partial(body, refs))

    def body(refs: Any, pieces: list[Piece], place: Any) -> None:
        refs_in, refs_out = refs[: len(inputs)], refs[len(inputs) :]
        dy_ref, x_refs, others = refs_in[0], refs_in[1 : 1 + count], iter(refs_in[1 + count :])
        kept_refs = [[None if part is None else next(others) for part in use] for use in kept]
        tiles = Tiles(norm, blocks, pieces, place, positions)
        scale, shift, mean, inv, *own = (tiles.vector(ref) for ref in refs_in[-2 - len(stats) :])
        if offset is not None:
            apart = over(jnp.subtract, own[0], mean)
            mean = over(jnp.subtract, mean, tiles.vector(refs_in[-3 - len(stats)]))  # of the parts alone
        slope = over(jnp.multiply, inv, scale)
        constant = over(lambda shift, mean, slope: shift - mean * slope, shift, mean, slope)

        def read(step: Any) -> tuple[list[Array], list[Array]]:
            return tiles.load(x_refs, step), tiles.load(dy_ref, step)

        def of_piece(x: Array, dy: Array, slope: Array, constant: Array) -> tuple[Array, Array]:
            x, du = x.astype(jnp.float32), dy.astype(jnp.float32)
            if norm.silu:
                u = x * slope[None, :] + constant[None, :]
                s = tiles.sigmoid(u)
                du = du * (s + u * s * (1 - s))
            return x, du

        def x_and_du(tile: Any) -> tuple[Sequence[Array], Sequence[Array]]:
            """x, and the gradient of what is before SiLU."""
            x, du = zip(*over(of_piece, *tile, slope, constant), strict=True)
            return x, du

        def products(step: Any, tile: Any) -> list[list[Array]]:
            x, du = x_and_du(tile)
            x = over(lambda x, mean, inv: (x - mean[None, :]) * inv[None, :], x, mean, inv)
            return [list(du), over(jnp.multiply, du, x)]

        def of_offset(inv: Array, scale: Array, dq: Array, first: Array, second: Array, apart: Array) -> Array:
            """The sum over the positions of what the norm sends back."""
            return inv * (scale * dq - positions * (first + apart * inv * second))

        last = tiles.steps - 1
        totals, tile = tiles.sums(read, products, 2)
        dq, dp = tiles.over_rows(totals)
        tiles.store_vector(refs_out[-1], dp, 0)
        tiles.store_vector(refs_out[-1], dq, 1)
        first, second = (tiles.group_mean(over(jnp.multiply, scale, d)) for d in (dq, dp))
        if offset is not None:
            doffset = over(of_offset, inv, scale, dq, first, second, apart)
            tiles.store_vector(refs_out[-1], doffset, 2)
        across = over(lambda inv, second: inv * inv * second, inv, second)
        rest = over(lambda inv, first, mean, across: inv * first - mean * across, inv, first, mean, across)

        def gradient(x: Array, du: Array, slope: Array, across: Array, rest: Array) -> Array:
            return du * slope[None, :] - (x * across[None, :] + rest[None, :])

        def write(step: Any, tile: Any) -> list[list[Array]]:
            dx = over(gradient, *x_and_du(tile), slope, across, rest)
            for use in kept_refs:
                dx = over(lambda dx, g: dx if g is None else dx + g.astype(jnp.float32), dx, tiles.load(use, step))
            tiles.store(refs_out[:count], step, dx)
            return [over(functools.partial(tiles.mask_rows, step), dx)] if total else []

        # The last tiles first: they may still be in the cache. (Forward, where there is half as much, it does not pay.)
        sums, _ = tiles.sums(lambda i: read(last - i), lambda i, tile: write(last - i, tile), int(total), tile)
        if total:
            tiles.store_vector(refs_out[-1], tiles.over_rows(sums)[0], rows.shape[1] - 1)

    rows = jax.ShapeDtypeStruct((batch, 2 + (offset is not None) + total, channels), jnp.float32)
    inputs = [dy, *parts, *jax.tree.leaves(kept), *([] if offset is None else [offset]), p, q, *stats]
    outputs = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in parts]
    return _call(group_norm_backward, norm, blocks, inputs, [*outputs, rows])


def _call(
    kernel: Callable[..., None],
    norm: Norm,
    blocks: Blocks,
    inputs: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    segments: int = 1,
) -> Any:
    """The kernel on all images and all groups, in so many segments of their positions.

    Where the batch is split over devices each has its own images.
    """

    def call(*arrays: Array) -> Any:
        size = arrays[0].shape[0]
        shapes = [jax.ShapeDtypeStruct((size, *o.shape[1:]), o.dtype) for o in outputs]

        def spec(a: Any) -> pl.BlockSpec:
            every = 0 if a.shape[0] == 1 else 1  # else one for all images
            return pl.BlockSpec((None, *a.shape[1:]), lambda _, image, *__: (every * image, *[0] * (a.ndim - 1)))

        return pl.pallas_call(
            kernel,
            out_shape=shapes,
            # Neighbours in memory at the same time.
            grid=(norm.groups * blocks.group // blocks.used, size, *([segments] if segments > 1 else [])),
            in_specs=[spec(a) for a in arrays],
            out_specs=[spec(o) for o in outputs],
            compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=2),
            interpret=norm.interpret,
            name=kernel.__name__,
        )(*arrays)

    return splitting.over_batch(call, (SOURCE, kernel.__name__, norm, blocks, segments), inputs, outputs)
