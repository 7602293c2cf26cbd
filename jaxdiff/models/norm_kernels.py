"""GroupNorm, with what `norm.GroupNorm` has around it, as two GPU kernels, written in Pallas and lowered by Triton.

A block of threads has some groups of one image. Forward, it sums over their positions, and reads them again for y;
backward likewise, where the first sums are the gradients of scale and shift.
"""

import functools
import itertools
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
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
    narrowest: int
    neighbours: int = 4


def tuning(positions: int, channels: int, group: int, backward: bool) -> Tuning:
    """That of a kernel for maps of so many positions and channels, of which a group has `group`."""
    in_pieces = positions >= 1024 and _power_of_2(group) != group  # 128 + 64 channels a block, not 64 + 32
    wide = in_pieces or (positions >= 4096 and channels > 128)
    return Tuning(8192 if positions >= 1024 else 4096, 16 if backward else 8, 128 if wide else 64)


class Blocks(NamedTuple):
    """How a norm's channels and positions are cut.

    used: channels, of whole groups, of a block of threads; rows: positions of a tile of these; warps: of 32 threads,
    that work on one.
    """

    group: int
    used: int
    rows: int
    warps: int
    tuning: Tuning


def cut(positions: int, channels: int, groups: int, backward: bool) -> Blocks:
    """The fewest whole groups of `narrowest` channels or more, if there are, and the rows that fill a tile."""
    group = channels // groups
    tuned = tuning(positions, channels, group, backward)
    counts = [n for n in range(1, groups + 1) if groups % n == 0]
    used = group * next((n for n in counts if n * group >= tuned.narrowest), groups)
    rows = min(_power_of_2(tuned.tile // used), pl.next_power_of_2(positions))
    warps = pl.next_power_of_2(max(1, rows * used // (32 * tuned.per_thread)))
    return Blocks(group, used, rows, warps, tuned)


def _power_of_2(number: int) -> int:
    """The largest that is not larger, or 1."""
    return 1 << max(0, number.bit_length() - 1)


def over(function: Callable[..., Any], *lists: Sequence[Any]) -> list[Any]:
    """`function` of the first elements of the lists, of the second ones, and so on."""
    return [function(*elements) for elements in zip(*lists, strict=True)]


class Piece(NamedTuple):
    """Channels [start, start + size) of a block of threads, all of part `number`, which begins at channel `low` of the
    concatenation. Triton knows sizes that are powers of 2."""

    number: int
    low: int
    start: int
    size: int


def pieces_of(block: int, used: int, widths: Sequence[int]) -> Iterator[Piece]:
    """The largest pieces that make up the channels of a block."""
    for number, (low, width) in enumerate(zip(itertools.accumulate(widths, initial=0), widths, strict=False)):
        start, stop = max(low - block * used, 0), min(low + width - block * used, used)
        while start < stop:
            size = _power_of_2(stop - start)
            yield Piece(number, low, start, size)
            start += size


def each_place(blocks: Blocks, widths: Sequence[int], body: Callable[[list[Piece], Any], None]) -> None:
    """Call `body` with the pieces of a block of threads, and its number; blocks of the same pieces are one program."""
    count, place = sum(widths) // blocks.used, pl.program_id(0)
    cuts = itertools.groupby(range(count), lambda block: list(pieces_of(block, blocks.used, widths)))
    for pieces, run in [(pieces, list(run)) for pieces, run in cuts]:
        if len(run) == count:
            return body(pieces, place)
        pl.when((place >= run[0]) & (place <= run[-1]))(functools.partial(body, pieces, place))


class Tiles:
    """The tiles of a block of threads: where they are, and arithmetic that both kernels share.

    What is said to be of [rows, columns], or of [columns], is a list of such arrays, one for each piece of the columns.
    """

    def __init__(self, norm: Norm, blocks: Blocks, pieces: Sequence[Piece], place: Any, positions: int):
        self.norm, self.blocks, self.pieces, self.positions = norm, blocks, pieces, positions
        # Triton has a thread read as many at once as it knows to be neighbours.
        neighbours = [min(blocks.tuning.neighbours, piece.size) for piece in pieces]
        column = [jnp.arange(piece.size) for piece in pieces]
        column = [jax.lax.div(c, n) * n + jax.lax.rem(c, n) for c, n in zip(column, neighbours, strict=True)]
        self.column = [piece.start + c for piece, c in zip(pieces, column, strict=True)]
        self.channel = [place * blocks.used + c for c in self.column]
        self.ragged = positions % blocks.rows != 0

    def vector(self, ref: Any) -> list[Float[Array, " columns"]]:
        """What `ref` [C] has for the block's channels."""
        return [triton.load(ref.at[channel]) for channel in self.channel]

    def store_vector(self, ref: Any, values: Sequence[Float[Array, " columns"]], row: int | None = None) -> None:
        """Write that, or a row of `ref` [rows, C]."""
        for channel, value in zip(self.channel, values, strict=True):
            triton.store(ref.at[channel] if row is None else ref.at[row, channel], value)

    def _rows(self, step: Any) -> Int[Array, " rows"]:
        return step * self.blocks.rows + jnp.arange(self.blocks.rows)

    def _places(self, refs: Any, step: Any) -> Iterator[tuple[Any, Array | None]]:
        """(reference to a tile's elements, mask) of each piece, of parts `refs` or of a single concatenation."""
        rows = self._rows(step)
        for piece, channel in zip(self.pieces, self.channel, strict=True):
            ref, low = (refs[piece.number], piece.low) if isinstance(refs, list | tuple) else (refs, 0)
            at, mask = rows[:, None], None
            if ref is None:
                yield None, None
                continue
            if self.ragged:
                mask = jnp.broadcast_to((rows < self.positions)[:, None], (len(rows), piece.size))
                if self.norm.interpret:
                    # It writes all lanes, in any order: those that are masked go where nothing is.
                    at = jnp.where(mask, at, jnp.iinfo(jnp.int32).max)
            yield ref.at[at, (channel - low)[None, :]], mask

    def load(self, refs: Any, step: Any) -> list[Any]:
        """The tile of `step` of parts `refs` [N, C_i], or of a single [N, C]; zero outside of the positions.

        None for pieces of parts whose ref is None.
        """

        def read(ref: Any, mask: Any) -> Any:
            return None if ref is None else triton.load(ref, mask=mask, other=None if mask is None else 0.0)

        return [read(ref, mask) for ref, mask in self._places(refs, step)]

    def store(self, refs: Any, step: Any, values: Sequence[Float[Array, "rows columns"]]) -> None:
        """Write that, in the dtypes of `refs`."""
        for (ref, mask), value in zip(self._places(refs, step), values, strict=True):
            triton.store(ref, value.astype(ref.dtype), mask=mask)

    def sums(
        self, read: Callable[[Any], Any], quantities: Callable[[Any, Any], Sequence[Any]], count: int
    ) -> tuple[list[list[Float[Array, " columns"]]], Callable[[Any], Any]]:
        """Sums over all positions of the `count` `quantities(step, read(step))`, and what to read with from now on.

        `quantities` may write as well. Where there is but one tile it is kept, and not read again.
        """
        if self.steps == 1:
            tile = read(0)
            return jax.tree.map(lambda value: value.sum(axis=0), quantities(0, tile)), lambda _: tile

        def add(step: Any, tile: Any, totals: Any) -> Any:
            return jax.tree.map(jnp.add, totals, quantities(step, tile))

        zeros = [[jnp.zeros((self.blocks.rows, piece.size), jnp.float32) for piece in self.pieces]] * count
        return jax.tree.map(lambda total: total.sum(axis=0), self._loop(read, add, zeros)), read

    def _loop(self, read: Callable[[Any], Any], body: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
        """`carry = body(step, read(step), carry)` for all steps; the next tile is read while one is worked on."""

        def turn(step: Any, state: Any) -> Any:
            following = read(jnp.minimum(step + 1, self.steps - 1))
            return following, body(step, *state)

        return jax.lax.fori_loop(0, self.steps, turn, (read(0), carry))[1]

    def group_mean(self, values: Sequence[Float[Array, " columns"]]) -> list[Float[Array, " columns"]]:
        """Each channel's mean of its group, of sums over the positions."""
        group, count = [column // self.blocks.group for column in self.column], self.positions * self.blocks.group

        def mean(own: Array) -> Array:
            same = [own[:, None] == other[None, :] for other in group]
            totals = [jnp.where(s, value[None, :], 0.0).sum(axis=1) for s, value in zip(same, values, strict=True)]
            return functools.reduce(jnp.add, totals) / count

        return [mean(own) for own in group]

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

    def body(refs: Any, pieces: list[Piece], place: Any) -> None:
        inputs, (p_ref, q_ref), (y_ref, mean_ref, inv_ref) = refs[:-5], refs[-5:-3], refs[-3:]
        tiles = Tiles(norm, blocks, pieces, place, positions)
        shift = tiles.vector(inputs[count]) if offset is not None else [jnp.zeros(piece.size) for piece in pieces]

        def read(step: Any) -> list[Array]:
            return tiles.load(inputs[:count], step)

        def moments(step: Any, tile: list[Array]) -> list[list[Array]]:
            x = over(lambda t: t.astype(jnp.float32), tile)
            if offset is not None:
                x = over(lambda x, shift: tiles.mask_rows(step, x + shift[None, :]), x, shift)
            return [x, over(jnp.square, x)]

        def scaled(x: Array, slope: Array, constant: Array) -> Array:
            u = x.astype(jnp.float32) * slope[None, :] + constant[None, :]
            return u * tiles.sigmoid(u) if norm.silu else u

        totals, read_again = tiles.sums(read, moments, 2)
        mean, square = (tiles.group_mean(total) for total in totals)
        inv = over(lambda s, m: jax.lax.rsqrt(jnp.maximum(s - m * m, 0.0) + norm.eps), square, mean)
        tiles.store_vector(mean_ref, mean)
        tiles.store_vector(inv_ref, inv)
        slope = over(jnp.multiply, inv, tiles.vector(p_ref))
        constant = over(lambda q, s, m, a: q + (s - m) * a, tiles.vector(q_ref), shift, mean, slope)

        def write(step: Any, tile: list[Array]) -> list[list[Array]]:
            tiles.store(y_ref, step, over(scaled, tile, slope, constant))
            return []

        tiles.sums(read_again, write, 0)

    stats = jax.ShapeDtypeStruct((batch, sum(widths)), jnp.float32)
    y = jax.ShapeDtypeStruct((batch, positions, sum(widths)), norm.dtype)
    inputs = [*parts, *([] if offset is None else [offset]), p, q]
    return _call(group_norm_forward, norm, blocks, inputs, [y, stats, stats])


def backward(
    norm: Norm,
    dy: Array,
    kept: Sequence[Sequence[Array | None]],
    parts: Sequence[Array],
    offset: Array | None,
    p: Array,
    q: Array,
    mean: Array,
    inv: Array,
    total: bool = False,
) -> tuple[list[Array], Float[Array, "b rows c"]]:
    """Gradients of the parts, and each image's for p, q and the offset, where there is one, in one array.

    `kept` has, of each other use of the parts, their gradients, which are added. With `total` the array's last row is
    the sum over the positions of the parts' gradients.
    """
    _, positions, channels = dy.shape
    blocks = cut(positions, channels, norm.groups, backward=True)
    *dparts, rows = _backward(norm, blocks, total, dy, tuple(map(tuple, kept)), tuple(parts), offset, p, q, mean, inv)
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
    mean: Array,
    inv: Array,
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
        scale, shift, mean, inv = (tiles.vector(ref) for ref in refs_in[-4:])
        if offset is not None:
            mean = over(jnp.subtract, mean, tiles.vector(refs_in[-5]))  # of the parts alone
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
            both = [list(du), over(jnp.multiply, du, x)]
            return both if offset is None else [*both, over(functools.partial(tiles.mask_rows, step), x)]

        (dq, dp, *normalised), read_again = tiles.sums(read, products, 2 if offset is None else 3)
        tiles.store_vector(refs_out[-1], dp, 0)
        tiles.store_vector(refs_out[-1], dq, 1)
        first, second = (tiles.group_mean(over(jnp.multiply, scale, d)) for d in (dq, dp))
        if offset is not None:
            (x,), n = normalised, positions
            doffset = over(lambda i, s, d, f, x, g: i * (s * d - n * f - x * g), inv, scale, dq, first, x, second)
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
        last = tiles.steps - 1
        sums, _ = tiles.sums(lambda i: read_again(last - i), lambda i, tile: write(last - i, tile), int(total))
        if total:
            tiles.store_vector(refs_out[-1], sums[0], rows.shape[1] - 1)

    rows = jax.ShapeDtypeStruct((batch, 2 + (offset is not None) + total, channels), jnp.float32)
    inputs = [dy, *parts, *jax.tree.leaves(kept), *([] if offset is None else [offset]), p, q, mean, inv]
    outputs = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in parts]
    return _call(group_norm_backward, norm, blocks, inputs, [*outputs, rows])


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
