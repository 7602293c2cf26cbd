"""Order and resumption: the global batch of a step is a function of (seed, step)."""

import time

import numpy as np
import pytest

from jaxdiff import images
from jaxdiff.data import array_source, eval_batches, train_batches
from jaxdiff.data.pipeline import batch_flips, batch_indices


def toy(n=20):
    pixels = np.arange(n, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 3), np.uint8)
    pixels[:, :, 1] += 100
    return array_source(pixels, np.arange(n), [str(i) for i in range(n)])


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
    def batches(**kwargs):
        return list(train_batches(toy(), seed=3, batch_size=8, start=2, stop=7, flip=True, threads=2, **kwargs))

    views = [batches(process_index=p, process_count=processes) for p in range(processes)]
    for whole, *parts in zip(batches(), *views, strict=True):
        for name, value in whole.items():
            assert (np.concatenate([part[name] for part in parts]) == value).all(), name


def test_worker_processes_give_the_same_batches():
    assert (labels(toy(), 2, 6, workers=2) == labels(toy(), 2, 6)).all()


def test_mirrored_are_those_that_the_step_says():
    mirror = batch_flips(3, 5, 8)
    assert 0 < mirror.sum() < 8
    (batch,) = train_batches(toy(), seed=3, batch_size=8, start=5, stop=6, flip=True, threads=1)
    assert (batch["mirror"] == mirror).all()
    left = np.asarray(images.from_batch(batch))[:, 0, 0, 0]
    right = np.asarray(images.from_batch(batch))[:, 0, 1, 0]
    assert ((left > right) == mirror).all()  # the right column is the brighter one
    (batch,) = train_batches(toy(), seed=3, batch_size=8, start=5, stop=6, flip=False, threads=1)
    assert "mirror" not in batch


def test_reading_is_bounded_however_slow_the_training():
    class Counts:
        reads = 0

        def __len__(self):
            return 20

        def batch(self, indices, mirror=None):
            self.reads += 1
            return {"label": indices}

    source = Counts()
    batches = train_batches(source, seed=0, batch_size=8, start=0, stop=1000, flip=False, threads=2)
    next(batches)
    time.sleep(0.5)  # in which all the thousand would be read
    assert 1 <= source.reads <= 8


def test_eval_batches_cover_everything_once():
    batches = list(eval_batches(toy(), batch_size=8))
    kept = np.concatenate([b["label"][b["weight"] > 0] for b in batches])
    assert kept.tolist() == list(range(20))
    assert all(b["label"].shape == (8,) for b in batches)


def test_eval_batches_of_some_rows():
    batches = list(eval_batches(toy(), batch_size=4, rows=range(3, 12)))
    kept = np.concatenate([b["label"][b["weight"] > 0] for b in batches])
    assert kept.tolist() == list(range(3, 12))


def test_eval_batches_of_two_processes_cover_everything_once():
    parts = [list(eval_batches(toy(), batch_size=8, process_index=p, process_count=2)) for p in range(2)]
    kept = np.concatenate([b["label"][b["weight"] > 0] for step in zip(*parts, strict=True) for b in step])
    assert kept.tolist() == list(range(20))
