"""Batches from a source: order, augmentation, read-ahead, and the way to the devices."""

import collections
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Bool, Int

from jaxdiff.data.sources import Batch, Source
from jaxdiff.mesh import batch_sharding

EPOCH, FLIP = 0, 1  # streams of the seeded generator


@functools.lru_cache(maxsize=2)  # a batch spans two epochs at most, unless it is larger than the data set
def _permutation(seed: int, epoch: int, n: int) -> Int[np.ndarray, " n"]:
    return np.random.default_rng((seed, EPOCH, epoch)).permutation(n)


def batch_indices(seed: int, step: int, batch_size: int, n: int) -> Int[np.ndarray, " batch"]:
    """Rows of the global batch of `step`: each epoch is a permutation of range(n), batches run on across its end."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, n)
    return np.concatenate([_permutation(seed, int(e), n)[offsets[epochs == e]] for e in np.unique(epochs)])


def batch_flips(seed: int, step: int, batch_size: int) -> Bool[np.ndarray, " batch"]:
    """Which rows of the global batch of `step` are to be mirrored, with probability 1/2 each."""
    return np.random.default_rng((seed, FLIP, step)).random(batch_size) < 0.5


def train_batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    flip: bool,
    threads: int,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This process's part of the global batches of steps [start, stop), read ahead in `threads` threads by Grain.

    With `workers` that many processes read, with the threads each.

    The global batch of a step is a function of (seed, step) alone. Process p holds the p-th of `process_count`
    equal parts of it, so that putting them together gives the same batch on any number of hosts.
    """
    rows = batch_size // process_count
    part = slice(process_index * rows, (process_index + 1) * rows)

    def read(step: int) -> Batch:
        indices = batch_indices(seed, step, batch_size, len(source))[part]
        return source.batch(indices, batch_flips(seed, step, batch_size)[part] if flip else None)

    # The buffer counts batches: a few hide the reading, Grain's default of 500 would fill the memory.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(4, threads))
    batches = grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags of its own, also where no command line was parsed
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    return iter(batches)


def eval_batches(
    source: Source, *, batch_size: int, rows: range | None = None, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Every row (or `rows`) once, in order; the last batch is filled up with rows of "weight" 0, not 1."""
    rows = range(len(source)) if rows is None else rows
    size = batch_size // process_count
    for first in range(rows.start, rows.stop, batch_size):
        indices = np.arange(first, first + batch_size)[process_index * size : (process_index + 1) * size]
        batch = source.batch(np.minimum(indices, rows.stop - 1))
        yield {**batch, "weight": (indices < rows.stop).astype(np.float32)}


def every_row(
    source: Source, mesh: jax.sharding.Mesh, *, batch_size: int, rows: range | None = None
) -> Iterator[dict[str, Any]]:
    """The batches of `eval_batches` as global arrays, split over the mesh."""
    index, count = jax.process_index(), jax.process_count()
    batches = eval_batches(source, batch_size=batch_size, rows=rows, process_index=index, process_count=count)
    return device_batches(batches, batch_sharding(mesh))


def device_batches(
    batches: Iterable[Batch], sharding: jax.sharding.Sharding, ahead: int = 2
) -> Iterator[dict[str, Any]]:
    """Global arrays of `batches`, `ahead` of them under way to the devices while one is computed with."""
    queue: collections.deque[dict[str, Any]] = collections.deque()
    for batch in batches:
        queue.append({k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()})
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue
