"""How the kernels of `norm_kernels` cut maps into blocks of threads and tiles, and what they have in common."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from jaxdiff.models.norm import Norm

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


def tuning(positions: int, channels: int, group: int, backward: bool, known: bool = False) -> Tuning:
    """That of a kernel for maps of so many positions and channels, of which a group has `group`; or with known sums."""
    if known:
        return Tuning(4096, 16, 64)
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


def cut(positions: int, channels: int, groups: int, backward: bool, known: bool = False) -> Blocks:
    """The fewest whole groups of `narrowest` channels or more, if there are, and the rows that fill a tile."""
    group = channels // groups
    tuned = tuning(positions, channels, group, backward, known)
    counts = [n for n in range(1, groups + 1) if groups % n == 0]
    used = group * next((n for n in counts if n * group >= tuned.narrowest), groups)
    rows = min(_power_of_2(tuned.tile // used), pl.next_power_of_2(positions))
    warps = pl.next_power_of_2(max(1, rows * used // (32 * tuned.per_thread)))
    return Blocks(group, used, rows, warps, tuned)


def segments_of(blocks: Blocks, positions: int) -> int:
    """Of 1,024 positions or more, that a map is cut into where no block has to sum over all of it."""
    steps = pl.cdiv(positions, blocks.rows)
    return math.gcd(steps, _power_of_2(max(1, positions // 1024)))


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
        """Write numbers of the block's channels to `ref` [C], or to a row of `ref` [rows, C]."""
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
        """Write a tile to `refs`, in their dtypes."""
        for (ref, mask), value in zip(self._places(refs, step), values, strict=True):
            triton.store(ref, value.astype(ref.dtype), mask=mask)

    def sums(
        self,
        read: Callable[[Any], Any],
        quantities: Callable[[Any, Any], Sequence[Any]],
        count: int,
        first: Any = None,
        wrap: bool = False,
        steps: int = 0,
    ) -> tuple[list[list[Float[Array, "rows columns"]]], Any]:
        """Of the `count` `quantities(step, tile)` the sums of all tiles, and the tile that is read last.

        The tile of a step is `read(step)`, that of step 0 `first` where given. The next one is read while one is worked
        on: beside the last one that itself, or with `wrap` that of step 0. `quantities` may write as well. `steps`: of
        fewer tiles than all.
        """
        tile, steps = read(0) if first is None else first, steps or self.steps
        if steps == 1:
            return list(quantities(0, tile)), tile

        def turn(step: Any, state: Any) -> Any:
            tile, totals = state
            following = read(jax.lax.rem(step + 1, steps) if wrap else jnp.minimum(step + 1, steps - 1))
            return following, jax.tree.map(jnp.add, totals, quantities(step, tile))

        zeros = [[jnp.zeros((self.blocks.rows, piece.size), jnp.float32) for piece in self.pieces]] * count
        tile, totals = jax.lax.fori_loop(0, steps, turn, (tile, zeros))
        return totals, tile

    def load_sums(self, refs: Sequence[Any]) -> list[list[Float[Array, "some columns"]]]:
        """Sums that are known, of parts' `refs` [some, 2, C_i], and those of squares."""

        def read(kind: int, piece: Piece, channel: Array) -> Array:
            ref = refs[piece.number]
            rows = jnp.arange(pl.next_power_of_2(ref.shape[0]))
            mask = None
            if len(rows) != ref.shape[0]:
                mask = jnp.broadcast_to((rows < ref.shape[0])[:, None], (len(rows), piece.size))
                if self.norm.interpret:
                    rows = jnp.where(rows < ref.shape[0], rows, jnp.iinfo(jnp.int32).max)
            at = ref.at[rows[:, None], kind, (channel - piece.low)[None, :]]
            return triton.load(at, mask=mask, other=None if mask is None else 0.0)

        return [over(functools.partial(read, kind), self.pieces, self.channel) for kind in range(2)]

    def store_sums(self, refs: Sequence[Any], *sums: Sequence[Float[Array, " columns"]]) -> None:
        """Write sums and those of squares, to parts' `refs` [1, 2, C_i]."""
        for kind, values in enumerate(sums):
            for piece, channel, value in zip(self.pieces, self.channel, values, strict=True):
                triton.store(refs[piece.number].at[0, kind, channel - piece.low], value)

    def over_rows(self, totals: Sequence[Sequence[Array]]) -> list[list[Float[Array, " columns"]]]:
        """Their sums over the rows of a tile."""
        return [[total.sum(axis=0) for total in pieces] for pieces in totals]

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
