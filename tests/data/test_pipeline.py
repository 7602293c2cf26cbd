"""Order and resumption: the global batch of a step is a function of (seed, step)."""

import numpy as np
import pytest

from jaxdiff.data import ArraySource, eval_batches, train_batches
from jaxdiff.data.pipeline import batch_flips, batch_indices


def toy(n=20):
    images = np.arange(n, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 3), np.uint8)
    images[:, :, 1] += 100
    return ArraySource(images, np.arange(n, dtype=np.int32), [str(i) for i in range(n)])


def labels(source, start, stop, flip=False, **kwargs):
    batches = train_batches(source, seed=3, batch_size=8, start=start, stop=stop, flip=flip, threads=2, **kwargs)
    return np.array([b["label"] for b in batches])


def test_every_epoch_holds_every_image_once_in_another_order():
    order = np.concatenate([batch_indices(0, k, 8, 20) for k in range(5)])
    first, second = order[:20], order[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert (first != second).any()


def test_batch_larger_than_the_data_set():
    counts = np.bincount(batch_indices(0, 0, 50, 20), minlength=20)
    assert set(counts) == {2, 3}


def test_order_depends_on_the_seed():
    assert (batch_indices(0, 0, 8, 20) != batch_indices(1, 0, 8, 20)).any()


def test_resuming_gives_the_same_batches():
    whole = labels(toy(), 0, 7)
    assert (labels(toy(), 4, 7) == whole[4:]).all()


@pytest.mark.parametrize("processes", [2, 4])
def test_parts_of_several_processes_make_the_same_global_batch(processes):
    whole = labels(toy(), 0, 7)
    parts = [labels(toy(), 0, 7, process_index=p, process_count=processes) for p in range(processes)]
    assert (np.concatenate(parts, axis=1) == whole).all()


def test_flips_follow_the_step_and_mirror_the_image():
    flips = batch_flips(3, 5, 8)
    assert 0 < flips.sum() < 8
    (batch,) = train_batches(toy(), seed=3, batch_size=8, start=5, stop=6, flip=True, threads=1)
    mirrored = batch["image"][:, 0, 0, 0] >= 100
    assert (mirrored == flips).all()


def test_flipping_leaves_the_source_unchanged():
    source = toy()
    source.batch(np.arange(4), np.ones(4, bool))
    assert (source.images == toy().images).all()


def test_eval_batches_cover_everything_once():
    batches = list(eval_batches(toy(), batch_size=8))
    kept = np.concatenate([b["label"][b["weight"] > 0] for b in batches])
    assert kept.tolist() == list(range(20))
    assert all(b["label"].shape == (8,) for b in batches)


def test_eval_batches_of_two_processes_cover_everything_once():
    parts = [list(eval_batches(toy(), batch_size=8, process_index=p, process_count=2)) for p in range(2)]
    kept = np.concatenate([b["label"][b["weight"] > 0] for step in zip(*parts, strict=True) for b in step])
    assert kept.tolist() == list(range(20))
