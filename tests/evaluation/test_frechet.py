"""The Frechet distance against pytorch-fid's, covariances without full rank included; moments of pieces on devices."""

import pathlib

import jax
import numpy as np
import pytest

from jaxdiff import mesh as meshes
from jaxdiff.errors import ConfigError
from jaxdiff.evaluation.frechet import Moments, frechet_distance

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "metrics.npz")


def moments(features, pieces=3):
    result = Moments()
    for part in np.array_split(features, pieces):
        result.add(part)
    return result


def moments_on(mesh, features, batch):
    """Batches split over devices, the last of which is filled up."""
    result = Moments()
    for i in range(0, len(features), batch):
        rows = features[i : i + batch]
        filled = np.full((batch, features.shape[1]), np.nan)
        filled[: len(rows)] = rows
        with jax.enable_x64(True):
            result.add(*meshes.put_batch((filled, np.arange(batch) < len(rows)), mesh))
    return result


def test_moments_of_pieces():
    x = GOLDEN["real"] + 1e6
    for m in (moments(x), moments_on(meshes.make_mesh(), x, 128)):
        mean, covariance = m.result()
        assert m.count == len(x) and covariance.dtype == np.float64
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(x.T), rtol=1e-8, atol=1e-8)


def test_as_pytorch_fid():
    real, fake = GOLDEN["real"], GOLDEN["fake"]
    assert frechet_distance(moments(real), moments(fake)) == pytest.approx(float(GOLDEN["fid"]), rel=1e-6)
    on_devices = moments_on(meshes.make_mesh(), real, 128)
    assert frechet_distance(on_devices, moments(fake, 7)) == pytest.approx(float(GOLDEN["fid"]), rel=1e-6)
    # scipy's matrix root of a singular product, which the reference takes, is itself good to some 1e-6.
    few = frechet_distance(moments(real), moments(fake[:12]))
    assert few == pytest.approx(float(GOLDEN["fid_rank_deficient_first12"]), rel=1e-6)
    assert frechet_distance(moments(real), moments(real)) == pytest.approx(0, abs=1e-9)


def test_no_score_of_what_is_not_there_or_not_finite():
    x = GOLDEN["real"].copy()
    with pytest.raises(ConfigError, match="1 rows have no covariance"):
        moments(x[:1], 1).result()
    with pytest.raises(ConfigError, match="0 rows"):
        Moments().result()
    x[[0, 5], [3, 4]] = np.nan, np.inf
    with pytest.raises(ConfigError, match="^features: 2 of 600 rows are not finite"):
        frechet_distance(moments(GOLDEN["real"]), moments(x))
