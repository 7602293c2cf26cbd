"""GroupNorm with its scale and shift per image and SiLU as GPU kernels: each array is read from memory once or twice.

A block of threads has some groups of one image. Forward, it sums over their positions, and reads them again (from the
cache, where the map is not large) for y; backward likewise, the gradients of scale and shift being the first sums.
Written in Pallas, lowered by Triton.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxdiff.models.norm import Norm

TILE = 4096  # elements of an array that a block of threads has at a time
WARPS = 8
SWAP, HINTS, UNROLL = True, False, 1
NARROWEST = 32  # channels of a block of threads at least, so that it reads whole sectors of memory


class Blocks(NamedTuple):
    """How a norm's channels and positions are cut. A tile is [rows, columns], of which `used` columns are channels."""

    group: int
    used: int
    columns: int
    rows: int


def cut(positions: int, channels: int, groups: int) -> Blocks:
    """The fewest whole groups of `NARROWEST` channels or more, if there are, and the rows that fill a tile."""
    group = channels // groups
    counts = [n for n in range(1, groups + 1) if groups % n == 0]
    used = group * next((n for n in counts if n * group >= NARROWEST), groups)
    columns = pl.next_power_of_2(used)
    return Blocks(group, used, columns, max(1, min(TILE // columns, pl.next_power_of_2(positions))))


class Tiles:
    """The tiles of a block of threads: where they are, and arithmetic that both kernels share."""

    def __init__(self, norm: Norm, widths: Sequence[int], positions: int):
        self.blocks = cut(positions, sum(widths), norm.groups)
        self.norm, self.widths, self.positions = norm, widths, positions
        self.column = jnp.arange(self.blocks.columns)
        self.channel = pl.program_id(0 if SWAP else 1) * self.blocks.used + self.column
        self.used = self.column < self.blocks.used

    def vector(self, ref: Any) -> Float[Array, " columns"]:
        return triton.load(ref.at[self.channel], mask=self.used, other=0.0)

    def store_vector(self, ref: Any, value: Float[Array, " columns"]) -> None:
        triton.store(ref.at[self._places(self.channel, self.used)], value, mask=self.used)

    def _places(self, index: Int[Array, "..."], inside: Array) -> Int[Array, "..."]:
        # The interpreter writes all lanes, in any order: those that are masked go where nothing is.
        return jnp.where(inside, index, jnp.iinfo(jnp.int32).max) if self.norm.interpret else index

    def _pieces(self, refs: Sequence[Any], step: Int[Array, ""]) -> list[tuple[Any, Array, Array]]:
        """(reference to a tile's elements, mask) of each part, and where these are a tile's rows at all."""
        rows = step * self.blocks.rows + jnp.arange(self.blocks.rows)
        inside = (rows < self.positions)[:, None] & self.used[None, :]
        pieces, low = [], 0
        for ref, width in zip(refs, self.widths, strict=True):
            own = inside
            if len(refs) > 1:
                own = inside & ((self.channel >= low) & (self.channel < low + width))[None, :]
            at = self._places(jnp.broadcast_to((self.channel - low)[None, :], own.shape), own)
            pieces.append((ref.at[rows[:, None], at], own, inside))
            low += width
        return pieces

    def load(self, refs: Sequence[Any], step: Int[Array, ""], policy: str | None = None) -> Float[Array, "rows columns"]:
        tiles = [triton.load(ref, mask=own, other=0.0, eviction_policy=policy) for ref, own, _ in self._pieces(refs, step)]
        return functools.reduce(jnp.add, [tile.astype(jnp.float32) for tile in tiles])

    def store(self, refs: Sequence[Any], step: Int[Array, ""], value: Float[Array, "rows columns"]) -> None:
        for (ref, own, _), whole in zip(self._pieces(refs, step), refs, strict=True):
            triton.store(ref, value.astype(whole.dtype), mask=own, eviction_policy='evict_first' if HINTS else None)

    def sums(self, tile: Callable[[Int[Array, ""]], Sequence[Array]], count: int) -> list[Float[Array, " columns"]]:
        """Sums over all positions of `count` quantities, of which `tile(step)` returns those of a tile."""
        zeros = [jnp.zeros((self.blocks.rows, self.blocks.columns), jnp.float32)] * count

        def body(step: Int[Array, ""], totals: Sequence[Array]) -> list[Array]:
            for k in range(n):
                totals = [total + value for total, value in zip(totals, tile(step * n + k), strict=True)]
            return totals
        n = UNROLL if self.steps % UNROLL == 0 else 1
        return [total.sum(axis=0) for total in jax.lax.fori_loop(0, self.steps // n, body, zeros)]

    def group_mean(self, value: Float[Array, " columns"]) -> Float[Array, " columns"]:
        """Each channel's mean of its group, of sums over the positions."""
        group = self.column // self.blocks.group
        same = group[:, None] == group[None, :]
        return jnp.where(same, value[None, :], 0.0).sum(axis=1) / (self.positions * self.blocks.group)

    def mask_rows(self, step: Int[Array, ""], value: Array) -> Array:
        """Zero outside of the positions, where there are such rows."""
        if self.positions % self.blocks.rows == 0:
            return value
        rows = step * self.blocks.rows + jnp.arange(self.blocks.rows)
        return jnp.where((rows < self.positions)[:, None], value, 0.0)

    @property
    def steps(self) -> int:
        return pl.cdiv(self.positions, self.blocks.rows)


def forward(norm: Norm, parts: Sequence[Array], offset: Array | None, p: Array, q: Array) -> tuple[Array, Array, Array]:
    """y [B, N, C], and the mean and 1 / standard deviation of each channel's group [B, C]; see `norm.normalise`."""
    widths, (batch, positions, _) = [part.shape[-1] for part in parts], parts[0].shape
    count, blocks = len(parts), cut(positions, sum(widths), norm.groups)

    def group_norm_forward(*refs: Any) -> None:
        inputs, (p_ref, q_ref), (y_ref, mean_ref, inv_ref) = refs[:-5], refs[-5:-3], refs[-3:]
        tiles = Tiles(norm, widths, positions)
        shift = tiles.vector(inputs[count])[None, :] if offset is not None else 0.0

        def read(step: Int[Array, ""], policy: Any = "evict_last" if HINTS else None) -> Array:
            return tiles.load(inputs[:count], step, policy) + shift

        def moments(step: Int[Array, ""]) -> list[Array]:
            x = tiles.mask_rows(step, read(step))
            return [x, x * x]

        mean, square = (tiles.group_mean(total) for total in tiles.sums(moments, 2))
        inv = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + norm.eps)
        tiles.store_vector(mean_ref, mean)
        tiles.store_vector(inv_ref, inv)
        slope = inv * tiles.vector(p_ref)
        constant = tiles.vector(q_ref) - mean * slope
        whole = Tiles(norm, [sum(widths)], positions)

        def write(step: Int[Array, ""], _: Any) -> None:
            u = read(step, "evict_first" if HINTS else None) * slope[None, :] + constant[None, :]
            whole.store([y_ref], step, u * jax.nn.sigmoid(u) if norm.silu else u)

        jax.lax.fori_loop(0, tiles.steps, write, None)

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
    """Gradients of the parts, of the offset where there is one, and of p and q; `kept` (none or as many as parts) are
    the gradients of other uses of the parts, and are added."""
    widths, (batch, positions, channels) = [part.shape[-1] for part in parts], dy.shape
    count, blocks = len(parts), cut(positions, channels, norm.groups)

    def group_norm_backward(*refs: Any) -> None:
        refs_in, refs_out = refs[: len(inputs)], refs[len(inputs) :]
        dy_ref, others, x_refs = refs_in[0], refs_in[1 : 1 + len(kept)], refs_in[1 + len(kept) :][:count]
        tiles, whole = Tiles(norm, widths, positions), Tiles(norm, [channels], positions)
        scale, shift, mean, inv = (tiles.vector(ref) for ref in refs_in[-4:])
        if offset is not None:
            mean = mean - tiles.vector(refs_in[-5])  # of the parts alone

        def read(step: Int[Array, ""], policy: Any = "evict_last" if HINTS else None) -> tuple[Array, Array]:
            """The normalised x, and the gradient of what is before SiLU."""
            x = (tiles.load(x_refs, step, policy) - mean[None, :]) * inv[None, :]
            du = whole.load([dy_ref], step, policy)
            if norm.silu:
                u = x * scale[None, :] + shift[None, :]
                s = jax.nn.sigmoid(u)
                du = du * s * (1 + u * (1 - s))
            return x, du

        def products(step: Int[Array, ""]) -> list[Array]:
            x, du = read(step)
            return [du, du * x, *([] if offset is None else [tiles.mask_rows(step, x)])]

        dq, dp, *normalised = tiles.sums(products, 2 if offset is None else 3)
        tiles.store_vector(refs_out[-2], dp)
        tiles.store_vector(refs_out[-1], dq)
        first, second = tiles.group_mean(scale * dq), tiles.group_mean(scale * dp)
        if offset is not None:
            doffset = inv * (scale * dq - positions * first - normalised[0] * second)
            tiles.store_vector(refs_out[-3], doffset)

        def write(step: Int[Array, ""], _: Any) -> None:
            x, du = read(step, "evict_first" if HINTS else None)
            dx = inv[None, :] * (scale[None, :] * du - first[None, :] - x * second[None, :])
            tiles.store(refs_out[:count], step, dx + tiles.load(others, step) if kept else dx)

        jax.lax.fori_loop(0, tiles.steps, write, None)

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

    def whole(*arrays: Array) -> Any:
        size = arrays[0].shape[0]
        shapes = [jax.ShapeDtypeStruct((size, *o.shape[1:]), o.dtype) for o in outputs]

        def spec(a: Any) -> pl.BlockSpec:
            return pl.BlockSpec((None, *a.shape[1:]), lambda i, j: (j if SWAP else i, *[0] * (a.ndim - 1)))

        return pl.pallas_call(
            kernel,
            out_shape=shapes,
            grid=(size, norm.groups * blocks.group // blocks.used)[:: -1 if SWAP else 1],
            in_specs=[spec(a) for a in arrays],
            out_specs=[spec(o) for o in outputs],
            compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
            interpret=norm.interpret,
            name=kernel.__name__,
        )(*arrays)

    split = custom_partitioning(whole)

    def partition(mesh: Any, arguments: Any, results: Any) -> Any:
        own = NamedSharding(mesh, PartitionSpec(arguments[0].sharding.spec[0]))
        return mesh, whole, jax.tree.map(lambda _: own, results), jax.tree.map(lambda _: own, arguments)

    factors: list[str] = []
    count = 0
    for shape in [array.shape for array in inputs] + [array.shape for array in outputs]:
        own = [f"d{count + k}" for k in range(len(shape) - 1)]
        factors.append(" ".join(["b", *own]))
        count += len(own)
    rule = f"{', '.join(factors[: len(inputs)])} -> {', '.join(factors[len(inputs) :])}"
    split.def_partition(partition=partition, sharding_rule=rule)
    return split(*inputs)
