"""Extractors of features: EfficientNet-Lite0, and one of a user's own, from images on 8 devices to a score."""

import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdiff import images
from jaxdiff import mesh as meshes
from jaxdiff.evaluation.extractors import EXTRACTORS, Extractor, Features, scored_name
from jaxdiff.evaluation.frechet import Moments, frechet_distance
from jaxdiff.models import efficientnet

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


def test_efficientnet():
    extractor = EXTRACTORS["effnet_lite0"](ConfigDict())
    image = np.load(GOLDEN / "effnet_lite0.npz")
    features = jax.jit(extractor.apply)(extractor.params, image["image_224"])
    np.testing.assert_allclose(features.pooled, image["features"], atol=1e-4)
    np.testing.assert_allclose(features.logits, image["logits"], atol=1e-4)
    assert features.spatial.shape == (3, 14 * 14 * 10) and (np.std(features.spatial, axis=0) > 0).all()
    assert "57934424.pth, SHA-256 57934424" in extractor.weights and str(efficientnet.SIZE) in extractor.resize
    names = [scored_name(score, extractor) for score in ("fid", "sfid", "is", "kid_low", "precision")]
    assert names == [f"{x}_effnet_lite0" for x in ("fd", "sfd", "is", "kid_low", "precision")]


def test_a_function_of_ones_own():
    def apply(params, image):
        h = images.to_unit(image) @ params
        return Features(h.mean((1, 2)), h[..., :1].reshape(len(h), -1), h.max((1, 2)))

    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 4)).astype(np.float32)
    extractor = Extractor("colours", weights, apply, resize="none", weights="drawn")
    assert scored_name("fid", extractor) == "fd_colours"

    mesh, run = meshes.make_mesh(), jax.jit(extractor.apply)
    image = rng.integers(0, 256, (24, 5, 6, 3), np.uint8)
    keep = np.arange(24) < 21

    def moments(image):
        result = Moments()
        rows, weight = meshes.put_batch((image, keep), mesh)
        result.add(run(meshes.put_replicated(extractor.params, mesh), rows).pooled, weight)
        return result

    # Twice the contrast about 127.5: twice the mean and four times the covariance.
    wide, narrow = moments(image), moments(np.round(image / 2 + 63.75).astype(np.uint8))
    mean, covariance = wide.result()
    np.testing.assert_allclose(mean, ((image[:21] / 127.5 - 1) @ weights).mean((0, 1, 2)), atol=1e-5)
    expected = np.square(mean / 2).sum() + np.trace(covariance) / 4
    assert frechet_distance(wide, narrow) == pytest.approx(expected, rel=0.02)


def test_products_are_in_full_precision():
    """On a GPU those of float32 have ten bits otherwise."""
    extractor = EXTRACTORS["effnet_lite0"](ConfigDict())
    found = []

    def collect(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("conv_general_dilated", "dot_general"):
                found.append(eqn.params["precision"])
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
                if hasattr(inner, "jaxpr"):
                    collect(inner.jaxpr)

    collect(jax.make_jaxpr(extractor.apply)(extractor.params, np.zeros((1, 32, 32, 3), np.uint8)).jaxpr)
    assert len(found) > 30 and set(found) == {(jax.lax.Precision.HIGHEST,) * 2}
