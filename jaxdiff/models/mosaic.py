"""What kernels in Mosaic GPU are written with: arithmetic, rings of shared memory, sums over a warp's share of a tile.

And how they are compiled beside the program that they are in.
"""

import collections
import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

add, sub, mul, div, rem = arith.addi, arith.subi, arith.muli, arith.divui, arith.remui
JOBS: collections.deque[Callable[[], Any]] = collections.deque()  # kernels to compile; the first one is under way
LOCK, STARTED = threading.Lock(), threading.Event()
# Of the threads of each, one.
each_warpgroup = functools.partial(utils.single_thread_predicate, utils.ThreadSubset.WARPGROUP)
each_warp = functools.partial(utils.single_thread_predicate, utils.ThreadSubset.WARP)


def index(number: int) -> ir.Value:
    """The constant."""
    return mgpu.c(number, ir.IndexType.get())


def as_index(number: ir.Value) -> ir.Value:
    """Of the type that places have."""
    return arith.index_cast(ir.IndexType.get(), number)


def equal(a: ir.Value, b: ir.Value) -> ir.Value:
    """a == b."""
    return arith.cmpi(arith.CmpIPredicate.eq, a, b)


def greater(a: ir.Value, b: ir.Value) -> ir.Value:
    """a > b."""
    return arith.cmpi(arith.CmpIPredicate.ugt, a, b)


def compile_ahead(kernel: Callable[..., Any], inputs: Sequence[jax.ShapeDtypeStruct]) -> None:
    """Has a kernel compiled on the side, for XLA to find it when it comes to the program that the kernel is in.

    It compiles all those of a program one after the other, each for half a second to one. The first one is compiled
    here, so that what compilers set up at their first use is set up by one thread. Not where there are several devices:
    what each has of a batch is not known when the whole program is traced.
    """
    if jax.default_backend() != "gpu" or jax.device_count() > 1:
        return
    job = jax.jit(kernel).lower(*inputs).compile  # lowered here: two threads may not do that with one kernel at once
    if not STARTED.is_set():
        job()
        STARTED.set()
        return
    with LOCK:
        JOBS.append(job)
        if len(JOBS) == 1:
            threading.Thread(target=_compile_jobs, name="kernels").start()


def _compile_jobs() -> None:
    """One after the other, until none is left; the process does not stay for them."""
    while True:
        if threading.main_thread().is_alive():
            with contextlib.suppress(Exception):  # which XLA will come upon itself
                JOBS[0]()
        with LOCK:
            JOBS.popleft()
            if not JOBS:
                return


def wait(barriers: Any, slots: int, count: ir.Value) -> ir.Value:
    """The slot of the piece before which there were `count`, once its barrier has been reached for it."""
    slot, odd = rem(count, index(slots)), rem(div(count, index(slots)), index(2))
    barriers[slot].wait_parity(greater(odd, index(0)))
    return slot


def next_slot(barriers: Any, slots: int, count: ir.Value) -> ir.Value:
    """The slot of that piece, once it is free."""
    with utils.when(greater(count, index(slots - 1))):
        wait(barriers, slots, sub(count, index(slots)))
    return rem(count, index(slots))


def store_sums(part: mgpu.FragmentedArray, target: ir.Value, start: int) -> None:
    """A warp's sums over its rows of a float32 tile [64 n, 64], and those of squares: to target [4, 2, columns].

    There they are the columns from `start` on, of the warp's own of four; the tile is laid out as WGMMA leaves it. A
    thread has 16 columns, pairs of eight apart, as have seven others. In three turns each leaves half of its sums to
    one of them, and takes the other half of that one's: in the end it has four, of all eight threads.
    """
    i32 = ir.IntegerType.get_signless(32)
    height, width = part.shape
    registers = part.registers.reshape(height // 64, width // 8, 2)  # pairs of columns

    def scalars(eight: int, i: int) -> list[ir.Value]:
        at = ir.DenseI64ArrayAttr.get([i])
        return [vector.extract(r, dynamic_position=[], static_position=at) for r in registers[:, eight].flat]

    columns = [scalars(eight, i) for eight in range(width // 8) for i in range(2)]
    sums = [functools.reduce(arith.addf, values) for values in columns]
    sums += [functools.reduce(arith.addf, [arith.mulf(v, v) for v in values]) for values in columns]
    thread = arith.remui(utils.thread_idx(), mgpu.c(32, i32))
    for distance in (16, 8, 4):
        bit = arith.andi(thread, mgpu.c(distance, i32))
        upper = arith.cmpi(arith.CmpIPredicate.ne, bit, mgpu.c(0, i32))
        pairs = list(zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True))
        left = [utils.shfl_bfly(arith.select(upper, low, high), distance) for low, high in pairs]
        taken = [arith.select(upper, high, low) for low, high in pairs]
        sums = [arith.addf(a, b) for a, b in zip(taken, left, strict=True)]
    lane, warp = as_index(thread), rem(as_index(utils.warp_idx()), index(4))
    kind, quarter = div(lane, index(16)), rem(div(lane, index(4)), index(4))
    for i, value in enumerate(sums):
        eight, pair = add(mul(quarter, index(2)), index(i // 2)), rem(lane, index(4))
        column = add(add(mul(eight, index(8)), mul(pair, index(2))), index(start + i % 2))
        memref.store(value, target, [warp, kind, column])
