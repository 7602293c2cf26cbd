"""Scores of images that come class by class, as those of class folders do: nothing depends on it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdiff import diffusion
from jaxdiff import mesh as meshes
from jaxdiff.evaluation import likelihood
from jaxdiff.evaluation.scores import inception


def test_the_parts_of_an_inception_score_have_all_classes():
    labels = np.repeat(np.arange(10), 40)
    logits = 20 * np.eye(10, dtype=np.float32)[labels]  # each image certainly of its class

    def score(rows):
        judged = SimpleNamespace(features=SimpleNamespace(logits=logits[rows]))
        mesh = meshes.make_mesh()
        return inception(SimpleNamespace(judged=judged, settings=SimpleNamespace(splits=10), mesh=mesh))["is"]

    in_order, in_turn = np.arange(400), np.arange(400).reshape(10, 40).T.reshape(-1)
    scores = [score(in_order), score(in_turn), score(np.random.default_rng(1).permutation(400))]
    assert all(8 < s < 10 for s in scores)  # each part in order has one class: 1


def test_the_bound_is_over_images_from_everywhere(monkeypatch):
    def bound(generator, params, decoder, key, rows, *, clip):
        total = rows["image"].astype(jnp.float32) + (0 if clip else 10_000)
        return diffusion.Likelihood(total, jnp.zeros_like(total), total[None])

    monkeypatch.setattr(likelihood, "_bound", bound)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    schedule, config = diffusion.make_schedule("cosine", 4), ConfigDict({"model": {"learned_variance": False}})
    generator = SimpleNamespace(process=schedule, mesh=mesh, decoder=None, config=config)

    class Source:
        """Whose images are their own numbers."""

        checksum = "none"

        def __len__(self):
            return 1000

        def batch(self, rows):
            return {"image": np.asarray(rows), "label": np.zeros(len(rows), np.int32)}

    def mean(num, batch_size, clip=True):
        settings = SimpleNamespace(seed=0, batch_size=batch_size, clip=clip)
        record = likelihood.likelihood_record(generator, None, settings, Source(), num, {})
        assert record["protocol"]["num"] == (num or 1000)
        return record["scores"]["bits_per_dim"]

    assert mean(0, 64) == pytest.approx(499.5) and mean(0, 64, clip=False) == pytest.approx(10_499.5)  # each once
    assert 400 < mean(100, 64) < 600 and mean(100, 64) == pytest.approx(mean(100, 7))  # not the first 100: 49.5
