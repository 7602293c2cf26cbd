"""Latents: encoded once, found again, refused when they are of another autoencoder."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import mesh as meshes
from jaxdiff.data import ArraySource
from jaxdiff.data.latents import Whitening, encode_source, load_whitening, measure_whitening, params_hash
from jaxdiff.errors import ConfigError
from jaxdiff.models import Posterior

N = 21  # no multiple of the batch


def source():
    rng = np.random.default_rng(0)
    return ArraySource(rng.integers(0, 256, (N, 4, 4, 3), np.uint8), np.arange(N, dtype=np.int32) % 5, list("abcde"))


class Encoder:
    """Halves the resolution and keeps two channels; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        x = batch[:, ::2, ::2, :2].astype(jnp.float32) / 255
        return Posterior(x, jnp.log(0.25 + 0 * x))


def encode(folder, encoder, autoencoder="a" * 64, flip=True):
    mesh, path = meshes.make_mesh(), folder / "train"
    return encode_source(source(), encoder, path, mesh, autoencoder=autoencoder, batch_size=8, flip=flip)


def test_both_orientations_of_every_image(tmp_path):
    images = source().images
    latents = encode(tmp_path, Encoder())
    rows, flip = np.array([20, 3, 3]), np.array([False, False, True])
    got = latents.batch(rows, flip)
    np.testing.assert_allclose(got["mean"][:2], images[rows[:2], ::2, ::2, :2] / np.float32(255), rtol=1e-6)
    np.testing.assert_allclose(got["mean"][2], images[3, ::2, ::-1][:, ::2, :2] / np.float32(255), rtol=1e-6)
    np.testing.assert_allclose(got["logvar"], np.log(0.25), rtol=1e-6)
    assert got["label"].tolist() == [0, 3, 3] and len(latents) == N and latents.class_names == list("abcde")


def test_encoded_once(tmp_path):
    encode(tmp_path, Encoder())
    again = Encoder()
    assert len(encode(tmp_path, again)) == N and again.calls == 0


def test_an_interrupted_encoding_does_not_count(tmp_path):
    class Dies(Encoder):
        def __call__(self, batch):
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().__call__(batch)

    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path, Dies())
    assert not (tmp_path / "train.json").exists()
    whole = Encoder()
    encode(tmp_path, whole)
    assert whole.calls == 6  # ceil(21 / 8) batches in each of two orientations


@pytest.mark.parametrize(
    ("change", "field"), [({"autoencoder": "b" * 64}, "autoencoder"), ({"flip": False}, "orientations")]
)
def test_other_latents_are_refused_and_left_alone(tmp_path, change, field):
    encode(tmp_path, Encoder())
    before = (tmp_path / "train.npy").read_bytes()
    with pytest.raises(ConfigError, match=rf"these latents have {field} .*another --workdir"):
        encode(tmp_path, Encoder(), **change)
    assert (tmp_path / "train.npy").read_bytes() == before


def test_whitening_of_draws(tmp_path):
    encode(tmp_path, Encoder(), flip=False)
    whitening = load_whitening(tmp_path / "train")
    moments = np.load(tmp_path / "train.npy")
    z = moments[0, ..., :2] + 0.5 * np.random.default_rng(1).standard_normal(moments[0, ..., :2].shape)
    white = whitening.whiten(z.astype(np.float32))
    np.testing.assert_allclose(white.mean((0, 1, 2)), 0, atol=0.15)
    np.testing.assert_allclose(white.std((0, 1, 2)), 1, atol=0.15)
    np.testing.assert_allclose(whitening.unwhiten(white), z, atol=1e-5)


def test_whitening_formula():
    mean = np.array([0.0, 2.0])  # two latents of one channel: mean 1, variance 1 + E[exp(logvar)] = 1 + 3
    moments = np.stack([mean, np.log([2.0, 4.0])], -1).reshape(1, 2, 1, 1, 2).astype(np.float32)
    np.testing.assert_allclose(measure_whitening(moments), Whitening([1.0], [2.0]), rtol=1e-6)


def test_hash_sees_names_values_and_shapes():
    base = {"a": np.zeros((2, 3), np.float32)}
    others = [
        {"b": base["a"]},
        {"a": base["a"].T},
        {"a": base["a"].astype(np.float64)},
        {"a": base["a"] + np.float32(1e-30)},
    ]
    hashes = {params_hash(tree) for tree in [base, *others]}
    assert len(hashes) == 5 and params_hash({"a": np.zeros((2, 3), np.float32)}) in hashes


def test_manifest_tells_all(tmp_path):
    encode(tmp_path, Encoder())
    manifest = json.loads((tmp_path / "train.json").read_text())
    assert manifest["autoencoder"] == "a" * 64 and manifest["images"] == N and manifest["orientations"] == 2
    assert manifest["labels"] == (np.arange(N) % 5).tolist() and set(manifest["whitening"]) == {"mean", "std"}
