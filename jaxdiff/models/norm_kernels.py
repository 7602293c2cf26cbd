"""GroupNorm, with what `norm.GroupNorm` has around it, as two GPU kernels, written in Pallas and lowered by Triton.

A block of threads has some groups of one image. Forward, it sums over their positions, and reads them again for y;
backward likewise, where the first sums are the gradients of scale and shift.
"""

import functools
import itertools
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from jaxdiff.models import splitting
from jaxdiff.models.norm import Norm

SOURCE = zlib.crc32(pathlib.Path(__file__).read_bytes())

SIGMOID = """{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t;
add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }"""  # 1 / (1 + 2^(-log2(e) x))


class Tuning(NamedTuple):
    """What a kernel is cut by; found by trying, on an H100 and an H200 (`benchmarks.layers --tiles`).

    tile: elements of an array that a block of threads has at a time, at most. per_thread: those of a thread. narrowest:
    channels of a block at least, so that it reads whole lines of memory. neighbours: channels that a thread reads at
    once: what is one number a channel takes as many of its registers.
    """

    tile: int
    per_thread: int
    narrowest: int = 64
    neighbours: int = 4


def tuning(positions: int, backward: bool) -> Tuning:
    """That of a kernel for maps of so many positions."""
    return Tuning(8192 if positions >= 1024 else 4096, 16 if backward else 8)


class Blocks(NamedTuple):
    """How a norm's channels and positions are cut. A tile is [rows, columns], of which `used` columns are channels.

    `warps`, of 32 threads, work on it.
    """

    group: int
    used: int
    columns: int
    rows: int
    warps: int
    tuning: Tuning


def cut(positions: int, channels: int, groups: int, backward: bool) -> Blocks:
    """The fewest whole groups of `narrowest` channels or more, if there are, and the rows that fill a tile."""
    group, tuned = channels // groups, tuning(positions, backward)
    counts = [n for n in range(1, groups + 1) if groups % n == 0]
    used = group * next((n for n in counts if n * group >= tuned.narrowest), groups)
    columns = pl.next_power_of_2(used)
    rows = max(1, min(tuned.tile // columns, pl.next_power_of_2(positions)))
    return Blocks(group, used, columns, rows, max(1, rows * columns // (32 * tuned.per_thread)), tuned)


class Part(NamedTuple):
    """The channels [low, low + width) of a concatenation are part `number` of it."""

    number: int
    low: int
    width: int


def each_place(blocks: Blocks, widths: Sequence[int], body: Callable[[list[Part]], None]) -> None:
    """Call `body` with the parts whose channels a block of threads has: a program for each such set of parts.

    So a block of one part reads without masks, and nothing in vain.
    """
    lows = [0, *itertools.accumulate(widths)]
    parts = [Part(i, *pair) for i, pair in enumerate(zip(lows, widths, strict=False))]

    def touched(block: int) -> tuple[Part, ...]:
        low, high = block * blocks.used, (block + 1) * blocks.used
        return tuple(part for part in parts if part.low < high and low < part.low + part.width)

    places = [(own, len(list(run))) for own, run in itertools.groupby(map(touched, range(lows[-1] // blocks.used)))]
    if len(places) == 1:
        return body(list(places[0][0]))
    first = 0
    for own, count in places:
        here = (pl.program_id(0) >= first) & (pl.program_id(0) < first + count)
        pl.when(here)(functools.partial(body, list(own)))
        first += count


class Tiles:
    """The tiles of a block of threads: where they are, and arithmetic that both kernels share."""

    def __init__(self, norm: Norm, blocks: Blocks, parts: Sequence[Part], positions: int):
        self.norm, self.blocks, self.parts, self.positions = norm, blocks, parts, positions
        column, neighbours = jnp.arange(blocks.columns), min(blocks.tuning.neighbours, blocks.columns)
        # Triton has a thread read as many at once as it knows to be neighbours.
        self.column = jax.lax.div(column, neighbours) * neighbours + jax.lax.rem(column, neighbours)
        self.channel = pl.program_id(0) * self.blocks.used + self.column
        self.used = None if self.blocks.used == self.blocks.columns else self.column < self.blocks.used
        self.ragged = positions % self.blocks.rows != 0

    def vector(self, ref: Any) -> Float[Array, " columns"]:
        """What `ref` [C] has for the block's channels."""
        return triton.load(ref.at[self.channel], mask=self.used, other=None if self.used is None else 0.0)

    def store_vector(self, ref: Any, value: Float[Array, " columns"]) -> None:
        """Write that."""
        triton.store(ref.at[self._places(self.channel, self.used)], value, mask=self.used)

    def _places(self, index: Int[Array, "..."], inside: Array | None) -> Int[Array, "..."]:
        # The interpreter writes all lanes, in any order: those that are masked go where nothing is.
        if inside is None or not self.norm.interpret:
            return index
        return jnp.where(inside, index, jnp.iinfo(jnp.int32).max)

    def _rows(self, step: Any) -> Int[Array, " rows"]:
        return step * self.blocks.rows + jnp.arange(self.blocks.rows)

    def _pieces(self, refs: Sequence[Any], step: Any) -> list[tuple[Any, Array | None]]:
        """(reference to a tile's elements, mask) of each part; without a mask where all are its elements."""
        pieces = []
        rows = self._rows(step)[:, None]
        for part in self.parts:
            masks = [] if self.used is None else [self.used[None, :]]
            if len(self.parts) > 1:
                masks.append(((self.channel >= part.low) & (self.channel < part.low + part.width))[None, :])
            if self.ragged:
                masks.append(rows < self.positions)
            at, mask = (self.channel - part.low)[None, :], None
            if masks:
                mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), (len(rows), self.blocks.columns))
                at = self._places(jnp.broadcast_to(at, mask.shape), mask)
            pieces.append((refs[part.number].at[rows, at], mask))
        return pieces

    def load(self, refs: Sequence[Any], step: Any) -> list[Array]:
        """The tile of `step` of the concatenation of all parts `refs` [N, C_i], to be `joined`; zero outside of it."""
        return [
            triton.load(ref, mask=mask, other=None if mask is None else 0.0) for ref, mask in self._pieces(refs, step)
        ]

    def joined(self, tiles: Sequence[Array]) -> Float[Array, "rows columns"]:
        """What `load` returned as one."""
        return functools.reduce(jnp.add, [tile.astype(jnp.float32) for tile in tiles])

    def store(self, refs: Sequence[Any], step: Any, value: Float[Array, "rows columns"]) -> None:
        """Write that, in the dtypes of `refs`."""
        for (ref, mask), part in zip(self._pieces(refs, step), self.parts, strict=True):
            triton.store(ref, value.astype(refs[part.number].dtype), mask=mask)

    def sums(
        self, read: Callable[[Any], Any], quantities: Callable[[Any, Any], Sequence[Array]], count: int
    ) -> tuple[list[Float[Array, " columns"]], Callable[[Any], Any]]:
        """Sums over all positions of the `count` `quantities(step, read(step))`, and what to read with from now on.

        Where there is but one tile it is kept, and not read again.
        """
        if self.steps == 1:
            tile = read(0)
            return [value.sum(axis=0) for value in quantities(0, tile)], lambda _: tile

        def add(step: Any, tile: Any, totals: Sequence[Array]) -> list[Array]:
            return [total + value for total, value in zip(totals, quantities(step, tile), strict=True)]

        zeros = [jnp.zeros((self.blocks.rows, self.blocks.columns), jnp.float32)] * count
        return [total.sum(axis=0) for total in self._loop(read, add, zeros)], read

    def each(self, read: Callable[[Any], Any], write: Callable[[Any, Any], None]) -> None:
        """Call `write(step, read(step))` for all steps."""
        if self.steps == 1:
            write(0, read(0))
        else:
            self._loop(read, lambda step, tile, _: write(step, tile), None)

    def _loop(self, read: Callable[[Any], Any], body: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
        """`carry = body(step, read(step), carry)` for all steps; the next tile is read while one is worked on."""

        def turn(step: Any, state: Any) -> Any:
            following = read(jnp.minimum(step + 1, self.steps - 1))
            return following, body(step, *state)

        return jax.lax.fori_loop(0, self.steps, turn, (read(0), carry))[1]

    def group_mean(self, value: Float[Array, " columns"]) -> Float[Array, " columns"]:
        """Each channel's mean of its group, of sums over the positions."""
        group = self.column // self.blocks.group
        same = group[:, None] == group[None, :]
        return jnp.where(same, value[None, :], 0.0).sum(axis=1) / (self.positions * self.blocks.group)

    def mask_rows(self, step: Any, value: Array) -> Array:
        """Zero outside of the positions, where there are such rows."""
        return jnp.where((self._rows(step) < self.positions)[:, None], value, 0.0) if self.ragged else value

    def sigmoid(self, x: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
        """1 / (1 + exp(-x)) to some last places of float32, in the four instructions that it takes."""
        if self.norm.interpret:
            return jax.nn.sigmoid(x)
        shape = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
        (y,) = triton.elementwise_inline_asm(SIGMOID, args=[x], constraints="=f,f", pack=1, result_shape_dtypes=shape)
        return y

    @property
    def steps(self) -> int:
        """Tiles of a block of threads."""
        return pl.cdiv(self.positions, self.blocks.rows)


def forward(norm: Norm, parts: Sequence[Array], offset: Array | None, p: Array, q: Array) -> tuple[Array, Array, Array]:
    """y [B, N, C], and the mean and 1 / standard deviation of each channel's group [B, C]; see `norm.normalise`."""
    blocks = cut(parts[0].shape[1], sum(part.shape[-1] for part in parts), norm.groups, backward=False)
    return _forward(norm, blocks, tuple(parts), offset, p, q)


# Jitted, here and below, so that norms of the same shapes are traced and lowered once for all of them.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(norm: Norm, blocks: Blocks, parts: tuple[Array, ...], offset: Array | None, p: Array, q: Array) -> Any:
    widths, (batch, positions, _) = [part.shape[-1] for part in parts], parts[0].shape
    count = len(parts)

    def group_norm_forward(*refs: Any) -> None:
        each_place(blocks, widths, functools.partial(body, refs))

    def body(refs: Any, own: list[Part]) -> None:
        inputs, (p_ref, q_ref), (y_ref, mean_ref, inv_ref) = refs[:-5], refs[-5:-3], refs[-3:]
        tiles = Tiles(norm, blocks, own, positions)
        shift = tiles.vector(inputs[count]) if offset is not None else jnp.zeros(tiles.blocks.columns)

        def read(step: Any) -> list[Array]:
            return tiles.load(inputs[:count], step)

        def moments(step: Any, tile: list[Array]) -> list[Array]:
            x = tiles.joined(tile)
            if offset is not None:
                x = tiles.mask_rows(step, x + shift[None, :])
            return [x, x * x]

        totals, read_again = tiles.sums(read, moments, 2)
        mean, square = (tiles.group_mean(total) for total in totals)
        inv = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + norm.eps)
        tiles.store_vector(mean_ref, mean)
        tiles.store_vector(inv_ref, inv)
        slope = inv * tiles.vector(p_ref)
        constant = tiles.vector(q_ref) + (shift - mean) * slope
        whole = Tiles(norm, blocks, [Part(0, 0, sum(widths))], positions)

        def write(step: Any, tile: list[Array]) -> None:
            u = tiles.joined(tile) * slope[None, :] + constant[None, :]
            whole.store([y_ref], step, u * tiles.sigmoid(u) if norm.silu else u)

        tiles.each(read_again, write)

    stats = jax.ShapeDtypeStruct((batch, sum(widths)), jnp.float32)
    y = jax.ShapeDtypeStruct((batch, positions, sum(widths)), norm.dtype)
    inputs = [*parts, *([] if offset is None else [offset]), p, q]
    return _call(group_norm_forward, norm, blocks, inputs, [y, stats, stats])


def backward(
    norm: Norm,
    dy: Array,
    kept: Sequence[Array],
    parts: Sequence[Array],
    offset: Array | None,
    p: Array,
    q: Array,
    mean: Array,
    inv: Array,
) -> list[Array]:
    """Gradients of the parts, and of each image for the offset, where there is one, and for p and q.

    `kept` (none or as many as parts) are the gradients of other uses of the parts, and are added.
    """
    _, positions, channels = dy.shape
    blocks = cut(positions, channels, norm.groups, backward=True)
    return _backward(norm, blocks, dy, tuple(kept), tuple(parts), offset, p, q, mean, inv)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(
    norm: Norm,
    blocks: Blocks,
    dy: Array,
    kept: tuple[Array, ...],
    parts: tuple[Array, ...],
    offset: Array | None,
    p: Array,
    q: Array,
    mean: Array,
    inv: Array,
) -> Any:
    widths, (batch, positions, channels) = [part.shape[-1] for part in parts], dy.shape
    count = len(parts)

    def group_norm_backward(*refs: Any) -> None:
        each_place(blocks, widths, functools.partial(body, refs))

    def body(refs: Any, own: list[Part]) -> None:
        refs_in, refs_out = refs[: len(inputs)], refs[len(inputs) :]
        dy_ref, others, x_refs = refs_in[0], refs_in[1 : 1 + len(kept)], refs_in[1 + len(kept) :][:count]
        tiles, whole = (Tiles(norm, blocks, parts, positions) for parts in (own, [Part(0, 0, channels)]))
        scale, shift, mean, inv = (tiles.vector(ref) for ref in refs_in[-4:])
        if offset is not None:
            mean = mean - tiles.vector(refs_in[-5])  # of the parts alone
        slope, constant = inv * scale, shift - mean * inv * scale

        def read(step: Any) -> tuple[list[Array], list[Array]]:
            return tiles.load(x_refs, step), whole.load([dy_ref], step)

        def x_and_du(tile: tuple[list[Array], list[Array]]) -> tuple[Array, Array]:
            """x, and the gradient of what is before SiLU."""
            x, du = tiles.joined(tile[0]), whole.joined(tile[1])
            if norm.silu:
                u = x * slope[None, :] + constant[None, :]
                s = tiles.sigmoid(u)
                du = du * (s + u * s * (1 - s))
            return x, du

        def products(step: Any, tile: Any) -> list[Array]:
            x, du = x_and_du(tile)
            x = (x - mean[None, :]) * inv[None, :]
            return [du, du * x, *([] if offset is None else [tiles.mask_rows(step, x)])]

        (dq, dp, *normalised), read_again = tiles.sums(read, products, 2 if offset is None else 3)
        tiles.store_vector(refs_out[-2], dp)
        tiles.store_vector(refs_out[-1], dq)
        first, second = tiles.group_mean(scale * dq), tiles.group_mean(scale * dp)
        if offset is not None:
            doffset = inv * (scale * dq - positions * first - normalised[0] * second)
            tiles.store_vector(refs_out[-3], doffset)
        across = inv * inv * second
        rest = inv * first - mean * across

        def write(step: Any, tile: Any) -> None:
            x, du = x_and_du(tile)
            dx = du * slope[None, :] - (x * across[None, :] + rest[None, :])
            tiles.store(refs_out[:count], step, dx + tiles.joined(tiles.load(others, step)) if kept else dx)

        # The last tiles first: they may still be in the cache. (Forward, where there is half as much, it does not pay.)
        last = tiles.steps - 1
        tiles.each(lambda step: read_again(last - step), lambda step, tile: write(last - step, tile))

    stats = jax.ShapeDtypeStruct((batch, channels), jnp.float32)
    inputs = [dy, *kept, *parts, *([] if offset is None else [offset]), p, q, mean, inv]
    outputs = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in parts]
    return _call(group_norm_backward, norm, blocks, inputs, outputs + [stats] * (2 + (offset is not None)))


def _call(
    kernel: Callable[..., None],
    norm: Norm,
    blocks: Blocks,
    inputs: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
) -> Any:
    """The kernel on all images and all groups; where the batch is split over devices each has its own images."""

    def call(*arrays: Array) -> Any:
        size = arrays[0].shape[0]
        shapes = [jax.ShapeDtypeStruct((size, *o.shape[1:]), o.dtype) for o in outputs]

        def spec(a: Any) -> pl.BlockSpec:
            every = 0 if a.shape[0] == 1 else 1  # else one for all images
            return pl.BlockSpec((None, *a.shape[1:]), lambda _, image: (every * image, *[0] * (a.ndim - 1)))

        return pl.pallas_call(
            kernel,
            out_shape=shapes,
            grid=(norm.groups * blocks.group // blocks.used, size),  # neighbours in memory at the same time
            in_specs=[spec(a) for a in arrays],
            out_specs=[spec(o) for o in outputs],
            compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=2),
            interpret=norm.interpret,
            name=kernel.__name__,
        )(*arrays)

    return splitting.over_batch(call, (SOURCE, kernel.__name__, norm, blocks), inputs, outputs)
