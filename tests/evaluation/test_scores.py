"""Scores: what they say of real digits, and of labels that are wrong."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdiff.data import load_source
from jaxdiff.evaluation.scores import knn_accuracy


@pytest.mark.parametrize("size", [8, 20, 32])
def test_neighbours_know_real_digits_and_wrong_labels(size):
    data = ConfigDict({"source": "digits", "image_size": size})
    train, val = load_source(data, "train"), load_source(data, "val")
    real = val.batch(np.arange(100))
    right = knn_accuracy(real["image"], real["label"], train, val)
    wrong = knn_accuracy(real["image"], (real["label"] + 1) % 10, train, val)
    assert right["knn_accuracy"] > 0.95 and 0.97 < right["knn_accuracy_real"] < 1
    assert wrong["knn_accuracy"] < 0.05
