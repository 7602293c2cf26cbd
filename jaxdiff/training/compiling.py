"""The training step's compilation, from shapes alone, while the state is made and the first images are read."""

import functools
import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxdiff.data import Source
from jaxdiff.mesh import batch_sharding
from jaxdiff.training import programs
from jaxdiff.training.flops import jaxpr_flops
from jaxdiff.training.step import TrainStep


def abstract_batch(source: Source, config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the training batches of a source, split over the mesh."""
    one = source.batch(np.zeros(1, int), np.zeros(1, bool) if config.data.flip else None)
    sharding = batch_sharding(mesh)

    def shape(row: np.ndarray) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(row.dtype)
        return jax.ShapeDtypeStruct((config.batch_size, *row.shape[1:]), dtype, sharding=sharding)

    return {name: shape(row) for name, row in one.items()}


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's garbage collector: to look through all that tracing makes and keeps is a quarter of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Compiling:
    """A jitted function being compiled for arguments (or their shapes) in a thread of its own.

    It is traced here and now, so that what is wrong with it is an error here; only XLA, which lets other threads run,
    works behind. Where the run ends before, the process ends when XLA has: it cannot be interrupted. Or it is what an
    earlier start compiled (`programs`), and nothing is traced.

    Attributes: found: whether it is an earlier start's. flops: counts its operations (`jaxpr_flops`). kept: done when
    the next start finds it, or cannot.
    """

    def __init__(self, function: jax.stages.Wrapped | TrainStep, *args: Any) -> None:
        begin = time.monotonic()
        path = programs.find(function, args)
        program = programs.load(path, args) if path else None
        self.found = program is not None
        if program is not None:
            self.flops: Callable[[], int] = lambda: program.flops
            self._future, self.kept = Future[tuple[jax.stages.Compiled, float]](), Future[None]()
            self._future.set_result((program.compiled, time.monotonic() - begin))
            self.kept.set_result(None)
            return
        with uncollected():
            traced = function.trace(*args)
            lowered = traced.lower()
        self.flops = functools.cache(lambda: jaxpr_flops(traced.jaxpr))

        def compile_it() -> tuple[jax.stages.Compiled, float]:
            return lowered.compile(), time.monotonic() - begin

        def keep_it() -> None:
            if path and not self._future.exception():
                programs.save(path, self._future.result()[0], self.flops)

        pool = ThreadPoolExecutor(1, "compile")
        self._future = pool.submit(compile_it)
        self.kept = pool.submit(keep_it)
        pool.shutdown(wait=False)

    def result(self) -> tuple[jax.stages.Compiled, float]:
        """Wait for the compiled function, and how many seconds it took from tracing on; XLA's errors are raised."""
        return self._future.result()
