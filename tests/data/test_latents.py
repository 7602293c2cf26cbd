"""Latents: encoded once, found again, refused when they are of another autoencoder or of other images."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import images
from jaxdiff import mesh as meshes
from jaxdiff.data import array_source
from jaxdiff.data.latents import Encoding, Whitening, encode_sources, latent_root, params_hash, whitening_of_sums
from jaxdiff.errors import ConfigError
from jaxdiff.models import Posterior
from jaxdiff.training import stages

N = 171  # no multiple of the batch, nor of the rows of a shard


def source(n=N, seed=0):
    rng = np.random.default_rng(seed)
    return array_source(rng.integers(0, 256, (n, 4, 4, 3), np.uint8), np.arange(n) % 5, list("abcde"))


SOURCES = {"train": source(), "val": source(5, 1)}


class Encoder:
    """Halves the resolution and keeps two channels; counts its calls."""

    def __init__(self, stop_after=None):
        self.calls, self.stop_after = 0, stop_after

    def __call__(self, batch):
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        x = (images.from_batch(batch)[:, ::2, ::2, :2] + 1) / 2
        return Posterior(x, jnp.log(0.25 + 0 * x))


def encode(root, encoder=None, autoencoder="a" * 64, mirrored=True, sources=SOURCES, cache_gb=1.0):
    encoding = Encoding(encoder or Encoder(), autoencoder, (2, 2, 2), mirrored, batch_size=8)
    return encode_sources(root, sources, encoding, meshes.make_mesh(), cache_gb=cache_gb, threads=2)


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_both_orientations_of_every_image(tmp_path, cache_gb):
    pixels = SOURCES["train"].batch(np.arange(N))["image"] / np.float32(255)
    latents, _ = encode(tmp_path / "l", cache_gb=cache_gb)
    train, val = latents["train"], latents["val"]
    everything = train.batch(np.arange(N))
    np.testing.assert_allclose(everything["mean"], pixels[:, ::2, ::2, :2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(everything["logvar"], np.log(0.25), rtol=1e-6)
    assert (everything["label"] == np.arange(N) % 5).all() and everything["label"].dtype == np.int32
    assert len(train) == N and len(val) == 5 and train.class_names == list("abcde")
    rows, mirror = np.array([170, 3, 3]), np.array([True, False, True])
    got = train.batch(rows, mirror)["mean"]
    np.testing.assert_allclose(got[1], pixels[3, ::2, ::2, :2], rtol=1e-5, atol=1e-6)
    for k in (0, 2):
        np.testing.assert_allclose(got[k], pixels[rows[k], ::2, ::-1][:, ::2, :2], rtol=1e-5, atol=1e-6)


def test_encoded_once(tmp_path):
    encode(tmp_path / "l")
    again = Encoder()
    latents, whitening = encode(tmp_path / "l", again)
    assert len(latents["train"]) == N and again.calls == 0


def test_interrupted_and_gone_on_with(tmp_path):
    root = tmp_path / "l"
    reference, white = encode(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        encode(root, Encoder(stop_after=22))
    assert not (root / "manifest.json").exists()
    rest = Encoder()
    latents, whitening = encode(root, rest)
    # 171 images in two orientations are 342 rows, in shards of 64: 32 images, 4 batches, 8 calls each.
    assert rest.calls == 2 * (22 + 1) - 8 * (22 // 8)
    rows = np.arange(N)
    for mirror in (None, np.ones(N, bool)):
        a, b = latents["train"].batch(rows, mirror), reference["train"].batch(rows, mirror)
        assert all((a[name] == b[name]).all() for name in b)
    assert whitening == white


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"autoencoder": "b" * 64}, "autoencoder"),
        ({"mirrored": False}, "orientations"),
        ({"sources": {"train": source(seed=7), "val": SOURCES["val"]}}, "images"),
    ],
)
def test_other_latents_are_refused_and_left_alone(tmp_path, change, field):
    encode(tmp_path / "l")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=rf"l: its {field} is .*wanted is .*another folder"):
        encode(tmp_path / "l", **change)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("name", ["holiday.jpg", "partial/thesis.txt"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, name):
    own = tmp_path / "mine" / name
    own.parent.mkdir(parents=True)
    own.write_text("precious")
    with pytest.raises(ConfigError, match="mine: exists and holds something else; name another folder"):
        encode(tmp_path / "mine")
    assert [path for path in (tmp_path / "mine").rglob("*") if path.is_file()] == [own]


def test_data_sets_have_folders_of_their_own(tmp_path):
    others = {"train": source(seed=7), "val": SOURCES["val"]}
    roots = {latent_root(tmp_path, s, m) for s in (SOURCES, others) for m in (True, False)}
    assert len(roots) == 4 and latent_root(tmp_path, dict(SOURCES), True) in roots


def test_whitening_of_draws(tmp_path):
    latents, whitening = encode(tmp_path / "l", mirrored=False)
    mean = latents["train"].batch(np.arange(N))["mean"]
    z = mean + 0.5 * np.random.default_rng(1).standard_normal(mean.shape)
    white = whitening.whiten(z.astype(np.float32))
    np.testing.assert_allclose(white.mean((0, 1, 2)), 0, atol=0.1)
    np.testing.assert_allclose(white.std((0, 1, 2)), 1, atol=0.1)
    np.testing.assert_allclose(whitening.unwhiten(white), z, atol=1e-5)


def test_whitening_formula():
    # Two latents of one channel: means 0 and 2, variances 2 and 4: mean 1, variance 1 + 3.
    sums = np.array([[0.0 + 2.0], [0.0 + 4.0], [2.0 + 4.0]])
    np.testing.assert_allclose(whitening_of_sums(sums, 2), Whitening([1.0], [2.0]), rtol=1e-6)


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
    encode(tmp_path / "l")
    manifest = json.loads((tmp_path / "l" / "manifest.json").read_text())
    assert manifest["settings"] == {
        "autoencoder": "a" * 64,
        "images": {split: s.checksum for split, s in SOURCES.items()},
        "orientations": 2,
    }
    assert set(manifest["whitening"]) == {"mean", "std"}
    assert sum(shard["rows"] for shard in manifest["shards"]["train"]) == 2 * N


def test_one_device_and_eight_give_the_same(tmp_path):
    one = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    encoding = Encoding(Encoder(), "a" * 64, (2, 2, 2), True, batch_size=8)
    alone, _ = encode_sources(tmp_path / "one", SOURCES, encoding, one, cache_gb=1.0, threads=2)
    eight, _ = encode(tmp_path / "eight")
    a, b = (latents["train"].batch(np.arange(N)) for latents in (alone, eight))
    assert all((a[name] == b[name]).all() for name in a)


def test_by_more_devices_than_the_autoencoder_s_batch_and_with_its_scaling_factor(tiny, tmp_path, monkeypatch):
    config = tiny("ldm")
    config.autoencoder.train.batch_size = 12
    config.diffusion.scaling_factor = 0.5
    image, noise = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 8, 8, 2))
    params = stages.build_autoencoder(config).init(jax.random.key(0), image, noise)
    monkeypatch.setattr(stages, "load_autoencoder", lambda *_: params)
    rng = np.random.default_rng(0)
    train, val = (array_source(rng.integers(0, 256, (n, 16, 16, 3), np.uint8), np.zeros(n), ["a"]) for n in (21, 3))
    decoder, (latents, _) = stages.encode_data(config, tmp_path, train, val, meshes.make_mesh())
    assert (decoder.whitening.whiten(np.ones((1, 8, 8, 2), np.float32)) == 0.5).all()
    assert jax.device_count() == 8 and len(latents) == 21 and latents.batch(np.arange(21))["mean"].any((1, 2, 3)).all()
