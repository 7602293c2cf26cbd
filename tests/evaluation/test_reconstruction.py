"""The Frechet distance of reconstructions, against its definition."""

import jax
import numpy as np
import pytest

from jaxdiff import images
from jaxdiff.evaluation.frechet import Moments, frechet_distance
from jaxdiff.evaluation.reconstruction import SCORES, effnet_lite0_distance, rfd_effnet_lite0
from jaxdiff.models import Posterior, efficientnet
from jaxdiff.models.perceptual import effnet_distance

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), np.uint8)


class Blur:
    """What is asked of an autoencoder; it keeps a quarter of the pixels."""

    def apply(self, params, x, method):
        if method == "encode":
            return Posterior(x[:, ::2, ::2], x[:, ::2, ::2])
        return x.repeat(2, 1).repeat(2, 2) * params


class Source:
    def __len__(self):
        return len(IMAGES)

    def batch(self, indices):
        return {"image": IMAGES[indices]}


def test_as_defined(monkeypatch):
    monkeypatch.setattr("jaxdiff.evaluation.reconstruction.BATCH", 4)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    scores = rfd_effnet_lite0(Blur(), np.float32(1), Source(), mesh)
    blurred = IMAGES[:, ::2, ::2].repeat(2, 1).repeat(2, 2)
    moments = Moments(), Moments()
    features = jax.jit(
        lambda x: efficientnet.apply(efficientnet.load(), efficientnet.resized(images.to_unit(x))).features
    )
    for side, x in zip(moments, (IMAGES, blurred), strict=True):
        side.add(np.asarray(features(x)))
    assert scores["rfd_images"] == len(IMAGES)
    assert scores["rfd_effnet_lite0"] == pytest.approx(frechet_distance(*moments), rel=1e-3)
    assert scores["rfd_effnet_lite0"] > 1

    distance = effnet_lite0_distance(Blur(), np.float32(1), Source(), mesh)["effnet_lite0_distance"]
    expected = jax.jit(effnet_distance)(efficientnet.load(), *(images.to_unit(x) for x in (IMAGES, blurred)))
    assert distance == pytest.approx(float(expected.mean()), rel=1e-3) and distance > 0.1


@pytest.mark.parametrize("score", SCORES.values())
def test_features_are_in_full_precision(score, monkeypatch):
    """On a GPU products of float32 have ten bits otherwise."""
    seen, real = [], efficientnet.apply

    def apply(*args, **kwargs):
        seen.append(jax.config.jax_default_matmul_precision)
        return real(*args, **kwargs)

    monkeypatch.setattr(efficientnet, "apply", apply)
    monkeypatch.setattr("jaxdiff.evaluation.reconstruction.BATCH", 4)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    score(Blur(), np.float32(1), Source(), mesh)
    assert seen and set(seen) == {"highest"}
