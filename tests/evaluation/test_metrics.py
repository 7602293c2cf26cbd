"""Scores of features against torch-fidelity's, on 8 devices and in blocks; neighbours against their definition."""

import pathlib

import numpy as np
import pytest

from jaxdiff import mesh as meshes
from jaxdiff.errors import ConfigError
from jaxdiff.evaluation import pairs
from jaxdiff.evaluation.inception_score import inception_score
from jaxdiff.evaluation.kernel_distance import kernel_distance, squared_mmd
from jaxdiff.evaluation.manifold import nearest, precision_recall

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "metrics.npz")
REAL, FAKE = GOLDEN["real"], GOLDEN["fake"]


@pytest.fixture
def mesh(monkeypatch):
    """All 8 devices, and blocks that leave rests."""
    monkeypatch.setattr(pairs, "QUERIES", 40)
    monkeypatch.setattr(pairs, "KEYS", 170)
    return meshes.make_mesh()


def golden(name):
    return pytest.approx(float(GOLDEN[name]), rel=1e-6)


def test_inception_score(mesh):
    assert inception_score(GOLDEN["logits"], mesh) == {
        "is": golden("inception_score_mean"),
        "is_std": golden("inception_score_std"),
    }
    certain = np.eye(10)[np.arange(40) % 10] * 1e4  # in uneven parts: 13, 13, 14 rows
    shares = [np.array([2] * 3 + [1] * 7) / 13] * 2 + [np.array([2] * 4 + [1] * 6) / 14]
    expected = [np.exp(-(p * np.log(p)).sum()) for p in shares]
    score = inception_score(certain, mesh, splits=3)
    assert score == {"is": pytest.approx(np.mean(expected)), "is_std": pytest.approx(np.std(expected))}
    assert inception_score(certain * 0, mesh, splits=1) == {"is": pytest.approx(1, abs=1e-12), "is_std": 0}


def test_kernel_distance(mesh):
    assert squared_mmd(FAKE, REAL[:500], mesh) == golden("kid_mmd2_unbiased_fake_vs_first500_real")
    whole = squared_mmd(FAKE, REAL, mesh)
    a, b = kernel_distance(REAL, FAKE, mesh, subsets=20), kernel_distance(REAL, FAKE, mesh, subsets=20, seed=1)
    assert a == kernel_distance(REAL, FAKE, mesh, subsets=20) != b
    for score in (a, b):
        assert score["kid_low"] < score["kid"] < score["kid_high"]
        assert score["kid"] == pytest.approx(whole, rel=0.1)
    same = kernel_distance(REAL, REAL, mesh, subsets=20, most=100)  # unbiased: negative as often as positive
    assert same["kid_low"] < 0 < same["kid_high"]


def test_precision_recall(mesh):
    score = precision_recall(REAL, FAKE, mesh)
    assert score == {"precision": golden("precision"), "recall": golden("recall")}
    assert precision_recall(REAL, REAL, mesh, k=1) == {"precision": 1, "recall": 1}
    far = precision_recall(REAL, FAKE + 100, mesh, k=5)
    assert far == {"precision": 0, "recall": 0}


def test_nearest(mesh):
    keys = np.concatenate([REAL, REAL[:3]]).astype(np.float32) + 1000  # far from 0: squares lose digits
    queries = np.concatenate([keys[590:602], FAKE.astype(np.float32) + 1000])
    rows, distances = nearest(queries, keys, 4, mesh)
    expected = np.linalg.norm(queries[:, None].astype(np.float64) - keys[None], axis=-1)
    order = np.argsort(expected, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(distances, np.take_along_axis(expected, order, 1), rtol=1e-12, atol=0)
    assert (distances[:12, 0] == 0).all() and rows[10:12, :2].tolist() == [[0, 600], [1, 601]]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda bad, mesh: inception_score(bad, mesh), "logits: 2 of 500 rows are not finite"),
        (lambda bad, mesh: squared_mmd(REAL, bad, mesh), "generated features: 2 of 500 rows are not finite"),
        (lambda bad, mesh: kernel_distance(bad, REAL, mesh), "real features: 2 of 500 rows are not finite"),
        (lambda bad, mesh: precision_recall(bad, REAL, mesh), "real features: 2 of 500 rows are not finite"),
        (lambda bad, mesh: nearest(REAL, bad, 1, mesh), "keys: 2 of 500 rows are not finite"),
        (lambda bad, mesh: inception_score(bad[2:11], mesh), "logits: 9 rows, where the score needs 10"),
        (lambda bad, mesh: squared_mmd(REAL, bad[2:3], mesh), "generated features: 1 rows, where the score needs 2"),
        (lambda bad, mesh: kernel_distance(REAL, bad[2:5], mesh), "generated features: 3 rows, where .* needs 4"),
        (lambda bad, mesh: precision_recall(bad[2:5], REAL, mesh), "real features: 3 rows, where the score needs 4"),
        (lambda bad, mesh: precision_recall(REAL, REAL, mesh, k=0), "k = 0: k has to be 1 at least"),
        (lambda bad, mesh: nearest(REAL, bad[2:5], 4, mesh), "keys: 3 rows, where the score needs 4"),
    ],
)
def test_no_score_of_too_few_rows_or_of_such_as_are_not_finite(score, message, mesh):
    bad = FAKE.copy()
    bad[0, 3], bad[1, :] = np.inf, np.nan
    with pytest.raises(ConfigError, match=message):
        score(bad, mesh)
