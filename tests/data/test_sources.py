"""What comes out of each source, and what a user is told when it cannot."""

import json
import os

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from jaxdiff.config import fields
from jaxdiff.data import load_source
from jaxdiff.data.decode import center_crop
from jaxdiff.data.encoded import read_class_file
from jaxdiff.data.records import fits_in_memory
from jaxdiff.data.sources import prepared_root
from jaxdiff.errors import ConfigError
from tests.tiny_birds import TinyBirds, TinyBirdsTrainOnly

COLOURS = {"robin": (200, 30, 30), "goose": (30, 30, 200)}


def data_config(**changes):
    data = fields.base("ddpm", "folder").data
    data.update(image_size=16, threads=2, cache_gb=1.0)
    data.update(changes)
    return data


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "birds"
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for k, suffix in enumerate(("jpg", "png", "webp", "JPEG")):
                Image.new("RGB", (40 + k, 20), colour).save(root / split / name / f"{k}.{suffix}")
    (root / "train" / "robin" / "notes.txt").write_text("not an image")
    (root / "train" / "robin" / "._0.jpg").write_text("what macOS leaves about")
    return root


def everything(source):
    return source.batch(np.arange(len(source)))


def test_digits():
    config = ConfigDict(dict(source="digits", image_size=32))
    train, val = load_source(config, "train"), load_source(config, "val")
    assert (len(train), len(val)) == (1500, 297)
    assert list(train.class_names) == [str(d) for d in range(10)]
    images = everything(train)["image"]
    assert images.shape == (1500, 32, 32, 3) and images.dtype == np.uint8
    assert images.min() < 20 and images.max() > 200
    seen = {row.tobytes() for row in images}
    assert sum(row.tobytes() in seen for row in everything(val)["image"]) < 5  # a few digits do occur twice
    assert train.checksum == load_source(config, "train").checksum != val.checksum


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_folder(folder, cache_gb):
    source = load_source(data_config(path=str(folder), cache_gb=cache_gb), "train")
    assert list(source.class_names) == ["goose", "robin"]
    batch = everything(source)
    assert batch["label"].tolist() == [0] * 4 + [1] * 4 and batch["label"].dtype == np.int32
    assert batch["image"].shape == (8, 16, 16, 3)
    assert (batch["image"][:4, 8, 8, 2] > 150).all() and (batch["image"][4:, 8, 8, 0] > 150).all()
    rows, mirror = np.array([5, 0]), np.array([True, False])
    some = source.batch(rows, mirror)
    assert (some["image"] == batch["image"][rows]).all() and (some["mirror"] == mirror).all()


def test_names_of_imagenet_100(folder):
    (folder / "Labels.json").write_text(json.dumps({"robin": "American robin, Turdus migratorius", "crane": "crane"}))
    assert list(load_source(data_config(path=str(folder)), "train").class_names) == ["goose", "American robin"]
    (folder / "Labels.json").write_text(json.dumps({"robin": "bird", "goose": "bird"}))  # which says which?
    assert list(load_source(data_config(path=str(folder)), "train").class_names) == ["goose", "robin"]
    (folder / "Labels.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"Labels\.json must be"):
        load_source(data_config(path=str(folder)), "train")


def refused(data, split="train"):
    with pytest.raises(ConfigError) as error:
        load_source(data, split)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_folder_says_how_to_get_the_data(tmp_path):
    said = refused(data_config(path=str(tmp_path / "nothing")))
    assert "data.path = " in said and "train,val" in said and "--config.data.path" in said


def test_folders_that_are_none(folder, tmp_path):
    (folder / "val" / "heron").mkdir()
    assert "heron" in refused(data_config(path=str(folder)), "val")
    (folder / "train" / "heron").mkdir()
    assert "no .jpg, .jpeg, .png, .webp files" in refused(data_config(path=str(folder)))
    (tmp_path / "flat" / "train").mkdir(parents=True)
    assert "no class folders" in refused(data_config(path=str(tmp_path / "flat")))


def test_names_that_are_not_utf8(folder):
    before = everything(load_source(data_config(path=str(folder)), "train"))["image"]
    goose = os.fsencode(folder / "train" / "goose")
    os.rename(goose + b"/0.jpg", goose + b"/0 caf\xe9.jpg")
    np.testing.assert_array_equal(everything(load_source(data_config(path=str(folder)), "train"))["image"], before)
    os.rename(goose, os.fsencode(folder / "train") + b"/caf\xe9")
    assert "must have a name in UTF-8" in refused(data_config(path=str(folder)))


@pytest.mark.parametrize("path", [".", "../birds"])
def test_the_folder_one_stands_in(folder, monkeypatch, path):
    monkeypatch.chdir(folder)
    assert len(load_source(data_config(path=path), "train")) == 8
    assert prepared_root(data_config(path=path)).resolve() == folder.with_name("birds-16px").resolve()
    monkeypatch.chdir(folder / "train")
    assert prepared_root(data_config(path="..")).resolve() == folder.with_name("birds-16px").resolve()


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_unreadable_image_is_named(folder, cache_gb):
    (folder / "train" / "goose" / "0.jpg").write_bytes(b"no image")
    (folder / "train" / "goose" / "nowhere.jpg").symlink_to("nothing")
    with pytest.raises(ConfigError, match=r"goose/0\.jpg cannot be read .*--mode=prepare"):
        everything(load_source(data_config(path=str(folder), cache_gb=cache_gb), "train"))
    (folder / "train" / "goose" / "0.jpg").unlink()
    with pytest.raises(ConfigError, match=r"goose/nowhere\.jpg cannot be read .*No such file"):
        everything(load_source(data_config(path=str(folder), cache_gb=cache_gb), "train"))


def noise(n=40, size=16):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


@pytest.mark.parametrize("names", [("images", "labels"), ("arr_0", "arr_1")])
def test_npz(tmp_path, names):
    images, labels = noise(), np.arange(40) % 3
    np.savez(tmp_path / "x.npz", **dict(zip(names, (images, labels), strict=True)), class_names=["a", "b", "c"])
    data = data_config(source="npz", path=str(tmp_path / "x.npz"))
    train, val = load_source(data, "train"), load_source(data, "val")
    assert (len(train), len(val)) == (38, 2) and list(train.class_names) == ["a", "b", "c"]
    table = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for batch in (everything(train), everything(val)):
        assert [table.pop(im.tobytes()) for im in batch["image"]] == batch["label"].tolist()
    assert not table  # every image is in one of them


def test_class_names_of_bytes(tmp_path):
    np.savez(tmp_path / "x.npz", noise(), np.arange(40) % 2, class_names=np.array([b"cat", b"dog"]))
    assert load_source(data_config(source="npz", path=str(tmp_path / "x.npz")), "train").class_names == ["cat", "dog"]


def test_npz_without_labels_and_of_another_size(tmp_path):
    np.savez(tmp_path / "x.npz", noise(size=40))
    source = load_source(data_config(source="npz", path=str(tmp_path / "x.npz")), "val")
    batch = everything(source)
    assert batch["image"].shape == (2, 16, 16, 3) and batch["label"].tolist() == [0, 0]
    expected = {center_crop(Image.fromarray(image), 16).tobytes() for image in noise(size=40)}
    assert {image.tobytes() for image in batch["image"]} <= expected


def test_npz_that_are_none(tmp_path):
    path = tmp_path / "x.npz"
    data = data_config(source="npz", path=str(path))
    assert "no such file" in refused(data)
    path.write_bytes(b"PK, but not really")
    assert "cannot be read" in refused(data)
    np.savez(path, noise().astype(np.float32))
    assert "arr_0 float32 [40, 16, 16, 3]" in refused(data)
    np.savez(path, noise(1))
    assert "two images or more" in refused(data)
    np.savez(path, noise()[:, :0, :0])
    assert "arr_0 uint8 [40, 0, 0, 3]" in refused(data)
    np.savez(path, np.zeros((6, 1, 40_000, 3), np.uint8))
    assert "cannot be resized to 128" in refused(data_config(source="npz", path=str(path), image_size=128))
    np.savez(path, noise(), np.arange(39))
    assert "40 integers" in refused(data)
    np.savez(path, images=noise(), labels=np.arange(40), class_names=["a"])
    assert "in 0..0" in refused(data)
    np.savez(path, noise())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in refused(data) or "damaged" in refused(data)
    np.savez(path, np.array([{"a": 1}], dtype=object))
    assert "cannot be read" in refused(data)  # it would take running what the file says


def tfds_data(folder, builder=TinyBirds, **changes):
    builder(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return data_config(source="tfds", name=builder.name, path=str(folder), **changes)


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_tfds(tmp_path, cache_gb):
    data = tfds_data(tmp_path, cache_gb=cache_gb)
    train, val = load_source(data, "train"), load_source(data, "val")
    assert (len(train), len(val)) == (40, 6) and list(train.class_names) == ["heron", "robin", "goose"]
    for source in (train, val):
        batch = everything(source)
        assert (batch["image"][:, 8, 8, 0] == 60 * batch["label"]).all() and set(batch["label"]) == {0, 1, 2}


def test_tfds_without_a_split_to_validate_on(tmp_path):
    data = tfds_data(tmp_path, TinyBirdsTrainOnly)
    train, val = load_source(data, "train"), load_source(data, "val")
    assert (len(train), len(val)) == (38, 2)


def test_tfds_that_cannot_be_read(tmp_path):
    data = tfds_data(tmp_path)
    assert "no_such_set" in refused(data_config(source="tfds", name="no_such_set", path=str(tmp_path)))
    (tmp_path / "classes.txt").write_text("robin\n")
    assert "--mode=prepare first" in refused(data_config(**{**data, "classes": str(tmp_path / "classes.txt")}))


def test_class_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("robin American robin\n\ngoose\n")
    assert read_class_file(path, ["heron", "robin", "goose"]) == ["goose", "robin"]
    for text, words in {"robin\nrobin": "twice", "stork": "no class", "": "is empty"}.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_class_file(path, ["heron", "robin", "goose"])
    with pytest.raises(ConfigError, match="no such file"):
        read_class_file(tmp_path / "nothing", [])


def test_what_is_kept_in_memory(monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**32 // 4096}.get)  # 4 GiB
    assert fits_in_memory(10**9, 1.0) and not fits_in_memory(10**9 + 1, 1.0)
    assert fits_in_memory(2**30, 100.0) and not fits_in_memory(2**30 + 1, 100.0)
    assert not fits_in_memory(1, 0.0)
