"""The Frechet distance against pytorch-fid's, covariances without full rank included."""

import pathlib

import numpy as np
import pytest

from jaxdiff.evaluation.frechet import Moments, frechet_distance

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "metrics.npz")


def moments(features, pieces=3):
    result = Moments()
    for part in np.array_split(features, pieces):
        result.add(part)
    return result


def test_moments_of_pieces():
    x = GOLDEN["real"] + 1e6
    mean, covariance = moments(x).result()
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.T), rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="1 rows"):
        moments(x[:1], 1).result()


def test_as_pytorch_fid():
    real, fake = GOLDEN["real"], GOLDEN["fake"]
    assert frechet_distance(moments(real), moments(fake)) == pytest.approx(float(GOLDEN["fid"]), rel=1e-6)
    # scipy's matrix root of a singular product, which the reference takes, is itself good to some 1e-6.
    few = frechet_distance(moments(real), moments(fake[:12]))
    assert few == pytest.approx(float(GOLDEN["fid_rank_deficient_first12"]), rel=1e-6)
    assert frechet_distance(moments(real), moments(real)) == pytest.approx(0, abs=1e-9)
