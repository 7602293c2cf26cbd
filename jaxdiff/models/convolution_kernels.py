"""The convolutions of `jaxdiff.models.convolutions` as one GPU kernel, written in Mosaic GPU, for Hopper.

A block has three warpgroups. One has TMA copy pieces of the map and of the kernel to shared memory, 64 channels at a
time: of the map all positions that a column of taps needs, with zeros for what lies beyond the border, of the kernel
one tap. Two multiply and add up, each its own positions. As many blocks as the GPU has multiprocessors take tile after
tile, and the copies for the next one go on while a result is written.
"""

import functools
import math
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, memref, nvvm

from jaxdiff.models import convolution_tiles, convolutions, mosaic
from jaxdiff.models.convolution_tiles import CHANNELS, PIECE, Counts, Place, Refs, Sizes, window
from jaxdiff.models.convolutions import Added, Cut
from jaxdiff.models.mosaic import (
    add,
    as_index,
    compile_ahead,
    div,
    each_warp,
    each_warpgroup,
    equal,
    greater,
    index,
    mul,
    next_slot,
    rem,
    store_sums,
    sub,
    wait,
)

FILES = __file__, convolution_tiles.__file__, convolutions.__file__, mosaic.__file__
SOURCE = [zlib.crc32(pathlib.Path(str(file)).read_bytes()) for file in FILES]
NAME = "convolve"
COPYING, MULTIPLYING = 56, 224  # registers of a thread
TILED = mgpu.TileTransform((8, CHANNELS))


@functools.cache
def build(
    shape: tuple[int, int, int, int],
    features: int,
    side: int,
    dtype: Any,
    chosen: Cut,
    added: Added,
    summed: bool,
    blocks: int,
    parted: int = 1,
) -> Callable[..., Any]:
    """The kernel for maps of `shape`: of a map, a kernel [side^2 c, features], and of what is added.

    Those are, where there are such, a bias, a map, and other maps and their kernels. Its results are the map, and if
    `summed` sums. With 2 taps to a side there are four kernels, one after the other, for each second row and column of
    a map [batch * height, 2, width, 2, features], and nothing is added.
    Args: blocks, that are at work at once: the GPU's multiprocessors; parted: maps that the features are divided into.
    """
    (batch, height, width, channels), s = shape, Sizes(shape, features, side, chosen, added, summed, blocks, parted)
    of = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    each = features // parted
    result = of((batch * height, 2, width, 2, features) if side == 2 else (batch, height, width, each))
    inputs = [of(shape), of((s.kinds * side**2 * channels, features))]
    inputs += [jax.ShapeDtypeStruct((features,), jnp.float32)] * added.bias + [result] * added.residual
    inputs += [of((batch, height, width, size)) for size in added.widths]
    inputs += [of((size, features)) for size in added.widths]
    sums = jax.ShapeDtypeStruct((s.kinds * batch * height * width // chosen.rows, 2, features), jnp.float32)
    shared = (
        of((chosen.map_stages, *s.halo, CHANNELS)),
        of((chosen.kernel_stages, CHANNELS // 8, chosen.columns // CHANNELS, 8, CHANNELS)),
        of((2, 2, PIECE // 8, 1, 8, CHANNELS)),
        jax.ShapeDtypeStruct((2, 4, 2, chosen.columns if summed else 4), jnp.float32),
        mgpu.Barrier(arrival_count=1, num_barriers=chosen.kernel_stages),
        mgpu.Barrier(arrival_count=2 * 4, num_barriers=chosen.kernel_stages),  # a warp each
        mgpu.Barrier(arrival_count=2 * 4, num_barriers=chosen.map_stages),
    )

    def body(ctx: mgpu.LaunchContext, *refs: Any) -> None:
        Block(s, dtype, ctx, Refs.of(s, refs)).run()

    with mlir.make_ir_context(), ir.Location.unknown():
        kernel = mgpu.as_gpu_kernel(
            body,
            grid=(s.blocks, 1, 1),
            block=(3 * 128, 1, 1),
            in_shape=tuple(inputs),
            out_shape=(*[result] * parted, *[sums] * summed),
            smem_scratch_shape=shared,
            module_name=NAME,
            kernel_name=NAME,
        )
    compile_ahead(kernel, inputs)
    return kernel


class Block:
    """What a block of threads does."""

    def __init__(self, sizes: Sizes, dtype: Any, ctx: mgpu.LaunchContext, refs: Refs) -> None:
        self.sizes, self.dtype, self.ctx, self.refs = sizes, jnp.dtype(dtype), ctx, refs
        self.warpgroup, self.number = utils.warpgroup_idx(), gpu.block_id(gpu.Dimension.x)
        self.which = as_index(self.warpgroup)

    def run(self) -> None:
        """Tile after tile, each warpgroup its part."""
        tiles, blocks, kind = self.sizes.tiles, self.sizes.blocks, self.warpgroup.type
        turns = div(sub(index(tiles + blocks - 1), self.number), index(blocks))

        def work(registers: int, action: Any, tile: Callable[[ir.Value], None]) -> None:
            def step(turn: ir.Value, _: Any) -> list[ir.Value]:
                tile(turn)
                return []

            nvvm.setmaxregister(registers, action)
            mgpu.fori(turns, [])(step)

        copying = arith.cmpi(arith.CmpIPredicate.eq, self.warpgroup, mgpu.c(2, kind))
        with utils.when(copying):
            work(COPYING, nvvm.SetMaxRegisterAction.decrease, self.copy_tile)
        with utils.when(arith.xori(copying, mgpu.c(1, copying.type))):
            work(MULTIPLYING, nvvm.SetMaxRegisterAction.increase, self.multiply_tile)
            self.ctx.await_async_copy(0)

    def place(self, turn: ir.Value) -> Place:
        """Of the block's tile of that turn. Neighbouring blocks have the same positions."""
        s = self.sizes
        tile = add(self.number, mul(turn, index(s.blocks)))
        place, feature = div(tile, index(s.columns)), mul(rem(tile, index(s.columns)), index(s.chosen.columns))
        place, kind = div(place, index(s.kinds)), rem(place, index(s.kinds))
        image, place = div(place, index(s.down * s.across)), rem(place, index(s.down * s.across))
        starts = image, div(place, index(s.across)), rem(place, index(s.across))
        image, row, column = (mul(start, index(size)) for start, size in zip(starts, s.chosen.box, strict=True))
        return Place(image, row, column, feature, kind)

    def before(self, turn: ir.Value) -> list[ir.Value]:
        """`Counts` of the tiles before."""
        return [*Counts(mul(turn, index(self.sizes.kernel_pieces)), mul(turn, index(self.sizes.map_pieces)))]

    def copy_tile(self, turn: ir.Value) -> None:
        """Has all that a tile needs copied, piece after piece, as there is room for it."""
        s, place = self.sizes, self.place(turn)
        starts = add(place.row, div(place.kind, index(2))), add(place.column, rem(place.kind, index(2)))
        above, left = (sub(start, index(s.side // 2)) for start in starts)
        first = place._replace(row=above, column=left)  # of the first tap
        step = functools.partial(self.copy_taps, first)
        counts = mgpu.fori(index(s.groups), self.before(turn))(step).results
        for source, kernel, width in zip(self.refs.maps, self.refs.kernels, s.added.widths, strict=True):
            step = functools.partial(self.copy_product, place, source, kernel)
            counts = mgpu.fori(index(width // CHANNELS), counts)(step).results
        for piece in range(s.kept):
            counts = self.copy_kept(place, piece, Counts(*counts))

    def copy_taps(self, first: Place, step: ir.Value, counts: Any) -> list[ir.Value]:
        """A piece of the map, and of the kernel each tap that it is for."""
        s, (count, maps) = self.sizes, counts
        chunks, taps, side, stages = s.chunks, s.chosen.taps, s.side, s.chosen.kernel_stages
        tap, channel = div(step, index(chunks)), mul(rem(step, index(chunks)), index(CHANNELS))
        # Either one of all taps, or those below one another, of as many.
        down, right = (index(0), tap) if taps == side else (div(tap, index(side)), rem(tap, index(side)))
        for i in range(taps):
            if i == 0:
                piece = next_slot(self.refs.map_empty, s.chosen.map_stages, maps)
            slot = next_slot(self.refs.empty, stages, count)
            self.expect(slot, CHANNELS * (s.chosen.columns + (math.prod(s.halo) if i == 0 else 0)))
            if i == 0:
                target = utils.memref_slice(self.refs.map_smem, piece)
                where = window(s.halo, first.image, add(first.row, down), add(first.column, right), channel)
                self.copy(self.refs.x, target, where, slot)
            line = add(mul(add(add(mul(first.kind, index(side)), down), index(i)), index(side)), right)
            start = add(mul(line, index(s.shape[-1])), channel)
            self.copy_kernel(self.refs.kernel, start, first.feature, slot)
            count = add(count, index(1))
        return [count, add(maps, index(1))]

    def copy_product(self, place: Place, source: Any, kernel: Any, step: ir.Value, counts: Any) -> list[ir.Value]:
        """A piece of a map that has a kernel of one tap, and of that."""
        s, counts = self.sizes, Counts(*counts)
        piece, slot = self.next_slots(counts)
        self.expect(slot, CHANNELS * (s.chosen.columns + math.prod(s.chosen.box)))
        target, channel = self.target(piece), mul(step, index(CHANNELS))
        self.copy(source, target, window(s.chosen.box, *place[:3], channel), slot)
        self.copy_kernel(kernel, channel, place.feature, slot)
        return [*counts.next()]

    def copy_kept(self, place: Place, number: int, counts: Counts) -> Counts:
        """A piece of the map that is added."""
        box = self.sizes.chosen.box
        piece, slot = self.next_slots(counts)
        self.expect(slot, CHANNELS * math.prod(box))
        target, channel = self.target(piece), add(place.feature, index(number * CHANNELS))
        self.copy(self.refs.residual, target, window(box, *place[:3], channel), slot)
        return counts.next()

    def next_slots(self, counts: Counts) -> tuple[ir.Value, ir.Value]:
        """Where the next piece of a map, and of a kernel, goes, once there is room."""
        chosen = self.sizes.chosen
        piece = next_slot(self.refs.map_empty, chosen.map_stages, counts.maps)
        return piece, next_slot(self.refs.empty, chosen.kernel_stages, counts.kernels)

    def target(self, piece: ir.Value) -> ir.Value:
        """The room of a piece of a map without the rows around."""
        return utils.memref_slice(self.refs.map_smem, (piece, slice(None), slice(0, self.sizes.chosen.box.height)))

    def expect(self, slot: ir.Value, elements: int) -> None:
        """So many numbers will come before that piece of the kernel is there."""
        self.refs.full[slot].arrive_expect_tx(2 * elements, predicate=each_warpgroup())

    def copy(self, source: Any, target: ir.Value, where: Any, slot: ir.Value, transform: Any = ()) -> None:
        """Has a piece copied, which `slot` waits for."""
        self.ctx.async_copy(
            src_ref=source,
            dst_ref=target,
            gmem_slice=where,
            gmem_transform=transform,
            swizzle=128,
            barrier=self.refs.full[slot],
            arrive=False,
            predicate=each_warpgroup(),
        )

    def copy_kernel(self, kernel: Any, start: ir.Value, feature: ir.Value, slot: ir.Value) -> None:
        """Has rows of a kernel copied."""
        where = mgpu.ds(start, CHANNELS), mgpu.ds(feature, self.sizes.chosen.columns)
        self.copy(kernel, utils.memref_slice(self.refs.kernel_smem, slot), where, slot, TILED)

    def multiply_tile(self, turn: ir.Value) -> None:
        """Multiplies and adds up what is the warpgroup's own of a tile, and writes it."""
        s, place = self.sizes, self.place(turn)
        own = mul(self.which, index(s.chosen.rows))  # its first position
        total = mgpu.WGMMAAccumulator.zero(s.chosen.rows, s.chosen.columns)
        step = functools.partial(self.multiply_taps, own)
        carry = mgpu.fori(index(s.groups), [total, *self.before(turn)])(step).results
        if s.added.widths:
            step = functools.partial(self.multiply_product, own)
            carry = mgpu.fori(index(s.products), carry)(step).results
        total, counts = carry[0], Counts(*carry[1:])
        nvvm.wgmma_wait_group_sync_aligned(0)
        self.free(counts)
        y = fragmented_array.optimization_barrier(total.value)
        if s.added.bias:
            y = y + self.bias(place).broadcast_in_dim(y.shape, (1,), y.layout)
        parts = [y[:, i * CHANNELS : (i + 1) * CHANNELS] for i in range(s.beside)]
        for i in range(s.kept):
            wait(self.refs.full, s.chosen.kernel_stages, counts.kernels)
            there = self.read(own, rem(counts.maps, index(s.chosen.map_stages)))
            parts[i] = parts[i] + mgpu.FragmentedArray.load_tiled(there, swizzle=128).astype(y.mlir_dtype)
            utils.warp_barrier()
            counts = counts.next()
            self.free(counts)
        for i, part in enumerate(parts):
            if s.summed:
                store_sums(part, utils.memref_slice(self.refs.sums_smem, self.which), i * CHANNELS)
            for j in range(s.below):
                self.write(place, own, i, j, part[j * PIECE : (j + 1) * PIECE])
        if s.summed:
            self.write_sums(turn, place.feature)

    def multiply_taps(self, own: ir.Value, step: ir.Value, carry: Any) -> list[Any]:
        """A piece of the map by all of its taps."""
        (total, count, maps), chosen = carry, self.sizes.chosen
        piece = rem(maps, index(chosen.map_stages))
        for i in range(chosen.taps):
            slot = wait(self.refs.full, chosen.kernel_stages, count)
            total = self.multiply(total, self.read(own, piece, i), slot)
            if i == 0:
                with utils.when(greater(step, index(0))):
                    self.free(Counts(count, maps))
            else:
                self.free(Counts(count, maps), map_too=False)
            count = add(count, index(1))
        return [total, count, add(maps, index(1))]

    def multiply_product(self, own: ir.Value, _: ir.Value, carry: Any) -> list[Any]:
        """A piece of a map that has a kernel of one tap."""
        (total, *rest), chosen = carry, self.sizes.chosen
        counts = Counts(*rest)
        slot = wait(self.refs.full, chosen.kernel_stages, counts.kernels)
        piece = rem(counts.maps, index(chosen.map_stages))
        total = self.multiply(total, self.read(own, piece), slot)
        self.free(counts)
        return [total, *counts.next()]

    def multiply(self, total: Any, rows: ir.Value, slot: ir.Value) -> Any:
        """total + rows @ piece of the kernel, under way: what was begun before is done."""
        total = mgpu.wgmma(total, rows, utils.memref_slice(self.refs.kernel_smem, slot), swizzle=128)
        nvvm.wgmma_commit_group_sync_aligned()
        nvvm.wgmma_wait_group_sync_aligned(1)
        return total

    def read(self, own: ir.Value, piece: ir.Value, below: int = 0) -> ir.Value:
        """The warpgroup's own rows of a piece of a map, or those of a tap further below."""
        s = self.sizes
        shape = math.prod(s.halo) // 8, 1, 8, CHANNELS
        rows = utils.memref_reshape(utils.memref_slice(self.refs.map_smem, piece), shape)
        start = add(div(own, index(8)), index(below * s.chosen.box.width // 8))
        return utils.memref_slice(rows, mgpu.ds(start, s.chosen.rows // 8))

    def free(self, counts: Counts, map_too: bool = True) -> None:
        """What was read last may be written over."""
        chosen = self.sizes.chosen
        freed = [(self.refs.empty, chosen.kernel_stages, counts.kernels)]
        freed += [(self.refs.map_empty, chosen.map_stages, counts.maps)] if map_too else []
        for barriers, slots, count in freed:
            barriers[rem(sub(count, index(1)), index(slots))].arrive(predicate=each_warp())

    def bias(self, place: Place) -> mgpu.FragmentedArray:
        """Of the tile's features."""
        own = utils.memref_slice(self.refs.bias, mgpu.ds(place.feature, self.sizes.chosen.columns))
        return mgpu.FragmentedArray.load_untiled(own, layout=fragmented_array.WGMMA_COL_LAYOUT, optimized=False)

    def write(self, place: Place, own: ir.Value, i: int, j: int, piece: mgpu.FragmentedArray) -> None:
        """Has a piece of the result written, which is number i of those beside, j of those below one another."""
        s, box = self.sizes, self.sizes.chosen.box
        first, each = add(own, index(j * PIECE)), box.width * box.height
        image = add(place.image, div(first, index(each)))
        row = add(place.row, div(rem(first, index(each)), index(box.width)))
        slot = utils.memref_slice(self.refs.out_smem, (self.which, (i * s.below + j) % 2))
        self.ctx.await_async_copy(1, await_read_only=True)
        piece.astype(mlir.dtype_to_ir_type(self.dtype)).store_tiled(slot, swizzle=128)
        mgpu.commit_shared()
        where = window(s.small, image, row, place.column, add(place.feature, index(i * CHANNELS)))
        if s.side == 2:
            lines = mgpu.ds(add(mul(image, index(s.shape[1])), row), s.small.images * s.small.height)
            down, right = (mgpu.ds(k, 1) for k in (div(place.kind, index(2)), rem(place.kind, index(2))))
            where = lines, down, where[2], right, where[3]
        source = utils.memref_reshape(slot, tuple(part.length for part in where))
        features = s.features // s.parted
        for number, out in enumerate(self.refs.outs):
            start = index(number * features)
            chosen = equal(div(place.feature, index(features)), index(number))
            self.ctx.async_copy(
                src_ref=source,
                dst_ref=out,
                gmem_slice=(*where[:-1], mgpu.ds(sub(where[-1].base, start), CHANNELS)),
                swizzle=128,
                arrive=False,
                predicate=arith.andi(each_warpgroup(), chosen),
            )
        nvvm.cp_async_bulk_commit_group()

    def write_sums(self, turn: ir.Value, feature: ir.Value) -> None:
        """Those of the four warps together: a thread has a column."""
        s, smem = self.sizes, self.refs.sums_smem
        tile = div(add(self.number, mul(turn, index(s.blocks))), index(s.columns))
        place, thread = add(mul(tile, index(2)), self.which), rem(as_index(utils.thread_idx()), index(128))
        for kind in range(2):
            values = [memref.load(smem, [self.which, index(warp), index(kind), thread]) for warp in range(4)]
            total = functools.reduce(arith.addf, values)
            memref.store(total, self.refs.sums, [place, index(kind), add(feature, thread)])
        utils.warpgroup_barrier()
