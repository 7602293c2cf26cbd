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

from jaxdiff.models import convolutions, mosaic
from jaxdiff.models.convolutions import Added, Box, Cut
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

FILES = __file__, convolutions.__file__, mosaic.__file__
SOURCE = [zlib.crc32(pathlib.Path(str(file)).read_bytes()) for file in FILES]
NAME = "convolve"
CHANNELS = 64  # at a time: lines of 128 bytes, which shared memory is swizzled by
PIECE = 64  # positions that are written at once
COPYING, MULTIPLYING = 56, 224  # registers of a thread


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
    (batch, height, width, channels), (biased, residual, widths) = shape, added
    box, taps, kinds = chosen.box, chosen.taps, 4 if side == 2 else 1
    halo = box._replace(height=box.height + taps - 1)
    across, down = width // box.width, height // box.height
    columns = features // chosen.columns
    tiles = batch // box.images * down * across * kinds * columns
    blocks, chunks = min(blocks, tiles), channels // CHANNELS
    groups = side**2 // taps * chunks
    written, pieces = chosen.columns // CHANNELS, chosen.rows // PIECE  # beside and below one another
    small = Box.of(PIECE, height, width)
    positions = box.images * box.height * box.width
    tiled = mgpu.TileTransform((8, CHANNELS))
    kept = written if residual else 0  # pieces of the map that is added
    others = kept + sum(widths) // CHANNELS
    map_pieces, kernel_pieces = groups + others, groups * taps + others  # of a tile
    assert small is not None  # or there is no cut

    def body(ctx: mgpu.LaunchContext, *refs: Any) -> None:
        # Barriers: a piece of the kernel has come, and what came before it; it is read; a piece of the map is read.
        map_smem, kernel_smem, out_smem, sums_smem, full, empty, map_empty = refs[-1]
        x, kernel, *rest = refs[:-1]
        bias: Any = rest.pop(0) if biased else None
        other: Any = rest.pop(0) if residual else None
        maps_beside, kernels_beside = ([rest.pop(0) for _ in widths] for _ in range(2))
        outs = [rest.pop(0) for _ in range(parted)]
        warpgroup, block = utils.warpgroup_idx(), gpu.block_id(gpu.Dimension.x)
        which = as_index(warpgroup)
        turns = div(sub(index(tiles + blocks - 1), block), index(blocks))

        def origin(turn: ir.Value) -> tuple[ir.Value, ...]:
            """The first image, row, column and feature of a tile, and its kind; neighbours have the same positions."""
            tile = add(block, mul(turn, index(blocks)))
            place, feature = div(tile, index(columns)), mul(rem(tile, index(columns)), index(chosen.columns))
            place, kind = div(place, index(kinds)), rem(place, index(kinds))
            image, place = div(place, index(down * across)), rem(place, index(down * across))
            starts = [image, div(place, index(across)), rem(place, index(across))]
            return *(mul(start, index(size)) for start, size in zip(starts, box, strict=True)), feature, kind

        def window(box: Box, image: ir.Value, row: ir.Value, column: ir.Value, channel: ir.Value) -> tuple[Any, ...]:
            starts, sizes = (image, row, column, channel), (*box, CHANNELS)
            return tuple(mgpu.ds(start, size) for start, size in zip(starts, sizes, strict=True))

        def before(turn: ir.Value) -> list[ir.Value]:
            """How many pieces of kernels and of maps have been copied for the tiles before."""
            return [mul(turn, index(kernel_pieces)), mul(turn, index(map_pieces))]

        def copies(turn: ir.Value) -> None:
            """Those for one tile."""
            image, row, column, feature, kind = origin(turn)
            starts = add(row, div(kind, index(2))), add(column, rem(kind, index(2)))
            above, left = (sub(start, index(side // 2)) for start in starts)  # of the first tap

            def copy(source: ir.Value, target: ir.Value, where: Any, slot: ir.Value, transform: Any = ()) -> None:
                ctx.async_copy(
                    src_ref=source,
                    dst_ref=target,
                    gmem_slice=where,
                    gmem_transform=transform,
                    swizzle=128,
                    barrier=full[slot],
                    arrive=False,
                    predicate=each_warpgroup(),
                )

            def expect(slot: ir.Value, elements: int) -> None:
                full[slot].arrive_expect_tx(2 * elements, predicate=each_warpgroup())

            def group(step: ir.Value, counts: Any) -> Any:
                count, maps = counts
                tap, channel = div(step, index(chunks)), mul(rem(step, index(chunks)), index(CHANNELS))
                # Either one of all taps, or those below one another, of as many.
                down, right = (index(0), tap) if taps == side else (div(tap, index(side)), rem(tap, index(side)))
                for i in range(taps):
                    if i == 0:
                        place = next_slot(map_empty, chosen.map_stages, maps)
                    slot = next_slot(empty, chosen.kernel_stages, count)
                    expect(slot, CHANNELS * (chosen.columns + (math.prod(halo) if i == 0 else 0)))
                    if i == 0:
                        copy(
                            x,
                            utils.memref_slice(map_smem, place),
                            window(halo, image, add(above, down), add(left, right), channel),
                            slot,
                        )
                    line = add(mul(add(add(mul(kind, index(side)), down), index(i)), index(side)), right)
                    rows = mgpu.ds(add(mul(line, index(channels)), channel), CHANNELS), mgpu.ds(feature, chosen.columns)
                    copy(kernel, utils.memref_slice(kernel_smem, slot), rows, slot, tiled)
                    count = add(count, index(1))
                return [count, add(maps, index(1))]

            counts = mgpu.fori(index(groups), before(turn))(group).results
            for beside, kernel_beside, size in zip(maps_beside, kernels_beside, widths, strict=True):

                def chunk(step: ir.Value, counts: Any, beside: Any = beside, kernel_beside: Any = kernel_beside) -> Any:
                    count, maps = counts
                    place = next_slot(map_empty, chosen.map_stages, maps)
                    slot = next_slot(empty, chosen.kernel_stages, count)
                    expect(slot, CHANNELS * (chosen.columns + positions))
                    target = utils.memref_slice(map_smem, (place, slice(None), slice(0, box.height)))
                    channel = mul(step, index(CHANNELS))
                    copy(beside, target, window(box, image, row, column, channel), slot)
                    rows = mgpu.ds(channel, CHANNELS), mgpu.ds(feature, chosen.columns)
                    copy(kernel_beside, utils.memref_slice(kernel_smem, slot), rows, slot, tiled)
                    return [add(count, index(1)), add(maps, index(1))]

                counts = mgpu.fori(index(size // CHANNELS), counts)(chunk).results
            count, maps = counts
            for piece in range(kept):
                place = next_slot(map_empty, chosen.map_stages, maps)
                slot = next_slot(empty, chosen.kernel_stages, count)
                expect(slot, CHANNELS * positions)
                target = utils.memref_slice(map_smem, (place, slice(None), slice(0, box.height)))
                copy(other, target, window(box, image, row, column, add(feature, index(piece * CHANNELS))), slot)
                count, maps = add(count, index(1)), add(maps, index(1))

        def multiplies(turn: ir.Value) -> None:
            """Those of one tile, and its result written."""
            image, row, column, feature, kind = origin(turn)
            own = mul(which, index(chosen.rows))  # its first position

            def read(place: ir.Value, below: int = 0) -> ir.Value:
                rows = utils.memref_reshape(utils.memref_slice(map_smem, place), (math.prod(halo) // 8, 1, 8, CHANNELS))
                start = add(div(own, index(8)), index(below * box.width // 8))
                return utils.memref_slice(rows, mgpu.ds(start, chosen.rows // 8))

            def free(barriers: Any, slots: int, count: ir.Value) -> None:
                """What was read last."""
                barriers[rem(sub(count, index(1)), index(slots))].arrive(predicate=each_warp())

            def multiply(step: ir.Value, carry: Any) -> Any:
                total, count, maps = carry
                place = rem(maps, index(chosen.map_stages))
                for i in range(taps):
                    slot = wait(full, chosen.kernel_stages, count)
                    total = mgpu.wgmma(total, read(place, i), utils.memref_slice(kernel_smem, slot), swizzle=128)
                    nvvm.wgmma_commit_group_sync_aligned()
                    nvvm.wgmma_wait_group_sync_aligned(1)
                    if i == 0:
                        with utils.when(greater(step, index(0))):
                            free(empty, chosen.kernel_stages, count)
                            free(map_empty, chosen.map_stages, maps)
                    else:
                        free(empty, chosen.kernel_stages, count)
                    count = add(count, index(1))
                return [total, count, add(maps, index(1))]

            zeros = mgpu.WGMMAAccumulator.zero(chosen.rows, chosen.columns)
            carry = mgpu.fori(index(groups), [zeros, *before(turn)])(multiply).results

            def multiply_beside(_: ir.Value, carry: Any) -> Any:
                total, count, maps = carry
                slot, place = wait(full, chosen.kernel_stages, count), rem(maps, index(chosen.map_stages))
                total = mgpu.wgmma(total, read(place), utils.memref_slice(kernel_smem, slot), swizzle=128)
                nvvm.wgmma_commit_group_sync_aligned()
                nvvm.wgmma_wait_group_sync_aligned(1)
                free(empty, chosen.kernel_stages, count)
                free(map_empty, chosen.map_stages, maps)
                return [total, add(count, index(1)), add(maps, index(1))]

            if widths:
                carry = mgpu.fori(index(sum(widths) // CHANNELS), carry)(multiply_beside).results
            total, count, maps = carry
            nvvm.wgmma_wait_group_sync_aligned(0)
            free(empty, chosen.kernel_stages, count)
            free(map_empty, chosen.map_stages, maps)
            y = fragmented_array.optimization_barrier(total.value)
            if biased:
                own_bias, layout = mgpu.ds(feature, chosen.columns), fragmented_array.WGMMA_COL_LAYOUT
                row_vector = mgpu.FragmentedArray.load_untiled(
                    utils.memref_slice(bias, own_bias), layout=layout, optimized=False
                )
                y = y + row_vector.broadcast_in_dim(y.shape, (1,), y.layout)
            parts = [y[:, i * CHANNELS : (i + 1) * CHANNELS] for i in range(written)]
            for i in range(kept):
                wait(full, chosen.kernel_stages, count)
                there = read(rem(maps, index(chosen.map_stages)))
                parts[i] = parts[i] + mgpu.FragmentedArray.load_tiled(there, swizzle=128).astype(y.mlir_dtype)
                utils.warp_barrier()
                count, maps = add(count, index(1)), add(maps, index(1))
                free(empty, chosen.kernel_stages, count)
                free(map_empty, chosen.map_stages, maps)
            for beside, part in enumerate(parts):
                if summed:
                    store_sums(part, utils.memref_slice(sums_smem, which), beside * CHANNELS)
                for below in range(pieces):
                    first = add(own, index(below * PIECE))
                    at = add(image, div(first, index(box.width * box.height)))
                    line = add(row, div(rem(first, index(box.width * box.height)), index(box.width)))
                    slot = utils.memref_slice(out_smem, (which, (beside * pieces + below) % 2))
                    ctx.await_async_copy(1, await_read_only=True)
                    rows = part[below * PIECE : (below + 1) * PIECE].astype(mlir.dtype_to_ir_type(jnp.dtype(dtype)))
                    rows.store_tiled(slot, swizzle=128)
                    mgpu.commit_shared()
                    where = window(small, at, line, column, add(feature, index(beside * CHANNELS)))
                    if side == 2:
                        lines = mgpu.ds(add(mul(at, index(height)), line), small.images * small.height)
                        down, right = (mgpu.ds(i, 1) for i in (div(kind, index(2)), rem(kind, index(2))))
                        where = lines, down, where[2], right, where[3]
                    source = utils.memref_reshape(slot, tuple(piece.length for piece in where))
                    for i, out in enumerate(outs):
                        first_feature = index(i * features // parted)
                        chosen_one = equal(div(feature, index(features // parted)), index(i))
                        ctx.async_copy(
                            src_ref=source,
                            dst_ref=out,
                            gmem_slice=(*where[:-1], mgpu.ds(sub(where[-1].base, first_feature), CHANNELS)),
                            swizzle=128,
                            arrive=False,
                            predicate=arith.andi(each_warpgroup(), chosen_one),
                        )
                    nvvm.cp_async_bulk_commit_group()
            if summed:
                write_sums(turn, feature)

        def write_sums(turn: ir.Value, feature: ir.Value) -> None:
            """Of the four warps together: a thread has a column."""
            tile = div(add(block, mul(turn, index(blocks))), index(columns))
            place, thread = add(mul(tile, index(2)), which), rem(as_index(utils.thread_idx()), index(128))
            for kind in range(2):
                values = [memref.load(sums_smem, [which, index(warp), index(kind), thread]) for warp in range(4)]
                memref.store(functools.reduce(arith.addf, values), rest[0], [place, index(kind), add(feature, thread)])
            utils.warpgroup_barrier()

        def work(registers: int, action: Any, tile: Callable[[ir.Value], None]) -> None:
            def step(turn: ir.Value, _: Any) -> list[ir.Value]:
                tile(turn)
                return []

            nvvm.setmaxregister(registers, action)
            mgpu.fori(turns, [])(step)

        copying = arith.cmpi(arith.CmpIPredicate.eq, warpgroup, mgpu.c(2, warpgroup.type))
        with utils.when(copying):
            work(COPYING, nvvm.SetMaxRegisterAction.decrease, copies)
        with utils.when(arith.xori(copying, mgpu.c(1, copying.type))):
            work(MULTIPLYING, nvvm.SetMaxRegisterAction.increase, multiplies)
            ctx.await_async_copy(0)

    of = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    width_of_each = features // parted
    result = of((batch * height, 2, width, 2, features) if side == 2 else (batch, height, width, width_of_each))
    inputs = [of(shape), of((kinds * side**2 * channels, features))]
    inputs += [jax.ShapeDtypeStruct((features,), jnp.float32)] * biased + [result] * residual
    inputs += [*(of((batch, height, width, size)) for size in widths), *(of((size, features)) for size in widths)]
    sums = jax.ShapeDtypeStruct((kinds * batch * height * width // chosen.rows, 2, features), jnp.float32)
    shared = [
        of((chosen.map_stages, *halo, CHANNELS)),
        of((chosen.kernel_stages, CHANNELS // 8, chosen.columns // CHANNELS, 8, CHANNELS)),
        of((2, 2, PIECE // 8, 1, 8, CHANNELS)),
        jax.ShapeDtypeStruct((2, 4, 2, chosen.columns if summed else 4), jnp.float32),
        mgpu.Barrier(arrival_count=1, num_barriers=chosen.kernel_stages),
        mgpu.Barrier(arrival_count=2 * 4, num_barriers=chosen.kernel_stages),  # a warp each
        mgpu.Barrier(arrival_count=2 * 4, num_barriers=chosen.map_stages),
    ]
    with mlir.make_ir_context(), ir.Location.unknown():
        kernel = mgpu.as_gpu_kernel(
            body,
            grid=(blocks, 1, 1),
            block=(3 * 128, 1, 1),
            in_shape=tuple(inputs),
            out_shape=(*[result] * parted, *[sums] * summed),
            smem_scratch_shape=tuple(shared),
            module_name=NAME,
            kernel_name=NAME,
        )
    compile_ahead(kernel, inputs)
    return kernel
