"""Scores with their protocol: the floor, the cache of real features, and what is refused."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import ddpm
from jaxdiff import images
from jaxdiff import mesh as meshes
from jaxdiff.clock import Stopwatch
from jaxdiff.data import load_source
from jaxdiff.errors import ConfigError
from jaxdiff.evaluation import judge as judges
from jaxdiff.evaluation.evaluate import sample_protocol
from jaxdiff.evaluation.extractors import Extractor, Features
from jaxdiff.evaluation.judge import Judge
from jaxdiff.evaluation.neighbours import neighbours_sheet
from jaxdiff.evaluation.records import describe

ALL = ("fd", "sfd", "is", "kid", "precision_recall", "nearest_train", "knn_accuracy")


def apply(params, image):
    """Means of the quarters, so that features are cheap, and tell digits apart."""
    small = images.to_unit(image).reshape(len(image), 4, 2, 4, 2, 3).mean((2, 4, 5)).reshape(len(image), 16)
    return Features(small, small[:, :5] * params, small[:, :10] * 4)


EXTRACTOR = Extractor("quarters", np.float32(2), apply, resize="none", weights="none, version 1")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxdiff" / "features"


@pytest.fixture(scope="module")
def data():
    fields = ConfigDict({"source": "digits", "image_size": 8})
    return load_source(fields, "train"), load_source(fields, "val")


def settings(**fields):
    config = ddpm.get_config("digits").eval
    config.update({"scores": ALL, **fields})
    return config


def judge_of(data, extractor=EXTRACTOR, **fields):
    return Judge(settings(**fields), *data, meshes.make_mesh(), extractor)


def test_real_images_are_at_their_floor_and_others_are_not(data, cache):
    train, _ = data
    judge = judge_of(data)
    batch = train.batch(np.arange(150))
    real = judge(batch["image"], batch["label"], {"images": "a"}, Stopwatch())
    dark = judge(batch["image"] // 2, batch["label"], {"images": "b"}, Stopwatch())
    assert set(real["scores"]) - {"knn_accuracy", "knn_accuracy_real"} == set(real["floor"])
    assert real["floor"] == dark["floor"]
    for name in ("fd_quarters", "sfd_quarters", "kid_quarters"):
        assert abs(real["scores"][name]) < 6 * abs(real["floor"][name]) + 1e-3, name
        assert dark["scores"][name] > 10 * abs(real["floor"][name]), name
    assert real["scores"]["precision_quarters"] > 0.7 > 0.1 > dark["scores"]["recall_quarters"]
    # These images are training images: memory, which real images that were held out are not.
    assert real["scores"]["nearest_train_quarters"] == 0 < real["floor"]["nearest_train_quarters"]
    p = real["protocol"]
    assert p["num"] == 150 and p["images"] == "a" and p["k"] == 3 and p["splits"] == 10
    assert p["reference"] == {"name": "val", "num": 297, "sha256": data[1].checksum}
    assert p["floor"] == {"name": "train", "num": 150}
    assert p["extractor"] == {"name": "quarters", "weights": "none, version 1", "resize": "none"}
    assert {"features", "features of real images", "scores", "compile"} == set(real["seconds"])
    json.dumps(real)
    said = describe({**real, "protocol": {**p, "images": "b"}})
    for word in (
        "fd_quarters",
        "(floor ",
        "150 b",
        "297 val images",
        "150 train images",
        "none, version 1",
        " s on 8 x",
    ):
        assert word in said
    other = judge_of(data, reference="train", scores=("fd",))(batch["image"], None, {"images": "a"}, Stopwatch())
    assert other["protocol"]["reference"]["num"] == 1500 and other["protocol"]["floor"] == {"name": "val", "num": 150}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "eta 0, w = 1.5, ema weights"),
        ({"guidance_interval": [200, 800], "guidance_rescale": 0.7}, ", w = 1.5 at t = 200 to 800 rescaled by 0.7, "),
        ({"autoguidance": "runs/weak", "autoguidance_step": 4000}, ", w = 1.5 by step 4,000 of runs/weak, "),
    ],
)
def test_a_record_says_how_its_samples_were_guided(fields, words):
    config = ddpm.get_config("digits")
    settings = config.sample
    settings.guidance = 1.5
    settings.update(fields)
    protocol = {**sample_protocol(config, settings, 4, 10), "num": 16}
    record = {"scores": {"fd": 1.0}, "floor": {}, "protocol": protocol, "seconds": {}, "device": "1 x cpu"}
    assert words in describe(record)


def test_features_of_real_images_are_kept_by_content_and_extractor(data, cache, monkeypatch):
    from jaxdiff.evaluation import sets

    computed = []
    extract = sets.ImageSet._extract
    monkeypatch.setattr(sets.ImageSet, "_extract", lambda self: computed.append(self.name) or extract(self))
    batch = data[0].batch(np.arange(40))

    def score(**change):
        judge = judge_of(data, EXTRACTOR._replace(**change), scores=("fd", "sfd"))
        computed.clear()
        return judge(batch["image"], None, {}, Stopwatch())["scores"], list(computed)

    first, before = score()
    again, after = score()
    assert before == ["images", "val images", "train images"] and after == ["images"] and first == again
    assert score(weights="none, version 2")[1] == before and score(resize="other")[1] == before
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:500])  # as a full disk leaves it
    assert score()[1] == before and score() == (first, ["images"])


def test_features_that_cannot_be_kept_are_computed_all_the_same(data, cache, capsys):
    batch = data[0].batch(np.arange(40))["image"]
    first = judge_of(data, scores=("fd",))(batch, None, {}, Stopwatch())["scores"]
    shutil.rmtree(cache)
    cache.write_text("a file, where the folder would be")
    assert judge_of(data, scores=("fd",))(batch, None, {}, Stopwatch())["scores"] == first
    assert "features of val images are not kept: " in capsys.readouterr().out


def test_features_that_are_not_finite_have_no_score(data, cache):
    def broken(params, image):
        features = apply(params, image)
        return features._replace(pooled=jnp.where(image[:, 0, 0, :1] > 200, jnp.nan, features.pooled))

    samples = data[0].batch(np.arange(40))["image"].copy()
    judge = judge_of(data, EXTRACTOR._replace(apply=broken), scores=("fd",))
    judge(np.minimum(samples, 100), None, {}, Stopwatch())
    samples[:3, 0, 0] = 255
    with pytest.raises(ConfigError, match="features of images: 3 of 40 rows are not finite"):
        judge(samples, None, {}, Stopwatch())


@pytest.mark.parametrize(
    ("fields", "num", "words"),
    [
        ({"scores": ("fd",)}, 1, "eval.num = 1: must be at least 2 for the score 'fd'"),
        ({"scores": ("is",)}, 9, "eval.num = 9: must be at least 10 for the score 'is'"),
        ({"scores": ("kid",)}, 3, "at least 4"),
        ({"scores": ("precision_recall",), "k": 297}, 400, "eval.reference = 'val'.*298.*these are 297"),
        ({"scores": ("knn_accuracy",)}, 5, "'knn_accuracy': needs labels"),
    ],
)
def test_too_few_images_or_no_labels_are_one_line(data, cache, fields, num, words):
    samples = data[0].batch(np.arange(num))["image"]
    with pytest.raises(ConfigError, match=words):
        judge_of(data, **fields)(samples, None, {}, Stopwatch())


def test_only_50000_are_called_so(data, cache, monkeypatch):
    monkeypatch.setattr(judges, "FULL", 40)
    samples = data[0].batch(np.arange(41))["image"]
    judge = judge_of(data, EXTRACTOR._replace(name="inception"), scores=("fd", "kid"))
    assert "fid_50k" in judge(samples[:40], None, {}, Stopwatch())["scores"]
    record = judge(samples, None, {}, Stopwatch())
    assert {"fid", "kid"} < set(record["scores"]) and "fid_50k" not in record["scores"] | record["floor"]


def test_the_picture_of_nearest_training_images_finds_copies(data, cache):
    train, _ = data
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    samples = np.concatenate([noise, train.batch(np.array([7]))["image"]])
    judge = judge_of(data, scores=(), neighbours=2)
    judge(samples, None, {}, Stopwatch())
    sheet = neighbours_sheet(judge, samples)
    # The copy comes first: it, and the same image as the nearest by features and by pixels, enlarged eightfold.
    first = sheet[16 : 16 + 64]
    copy = np.repeat(np.repeat(samples[-1], 8, 0), 8, 1)
    for left in (0, 64 + 12, 64 + 12 + 3 * 64 + 2 * 2 + 12):
        np.testing.assert_array_equal(first[:, left : left + 64], copy)
    assert sheet.shape == (16 + 2 * (64 + 14), 7 * 64 + 2 * 12 + 4 * 2, 3)
    assert neighbours_sheet(judge_of(data), samples) is None
    for larger in (samples.repeat(3, 1).repeat(3, 2), samples.repeat(6, 2)):  # of another project
        assert neighbours_sheet(judge, larger).shape == sheet.shape


def test_too_few_of_ones_own_images_name_their_field(data, cache):
    with pytest.raises(ConfigError, match=r"config.eval.images = 'x.npz': must be at least 2 images .*; these are 1"):
        judge_of(data, scores=("fd",))(data[0].batch(np.arange(1))["image"], None, {"images": "x.npz"}, Stopwatch())
