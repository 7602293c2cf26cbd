"""What comes out of each source, and what a user is told when it cannot."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from jaxdiff.data import load_source
from jaxdiff.data.sources import center_crop, read_image
from jaxdiff.errors import ConfigError


def data_config(path, **fields):
    defaults = dict(source="folder", path=str(path), image_size=16, flip=True, threads=2, cache_gb=1.0)
    return ConfigDict({**defaults, **fields})


@pytest.fixture
def folder(tmp_path):
    colours = {"robin": (200, 30, 30), "goose": (30, 30, 200)}
    for split in ("train", "val"):
        for name, colour in colours.items():
            (tmp_path / split / name).mkdir(parents=True)
            for k, suffix in enumerate(("jpg", "png", "webp")):
                Image.new("RGB", (40 + k, 20), colour).save(tmp_path / split / name / f"{k}.{suffix}")
    (tmp_path / "train" / "robin" / "notes.txt").write_text("not an image")
    return tmp_path


def test_digits():
    config = ConfigDict(dict(source="digits", image_size=32))
    train, val = load_source(config, "train"), load_source(config, "val")
    assert (len(train), len(val)) == (1500, 297)
    assert list(train.class_names) == [str(d) for d in range(10)]
    batch = train.batch(np.arange(3), np.zeros(3, bool))
    assert batch["image"].shape == (3, 32, 32, 3) and batch["image"].dtype == np.uint8
    assert batch["image"].min() < 20 and batch["image"].max() > 200
    seen = {row.tobytes() for row in train.images}
    assert sum(row.tobytes() in seen for row in val.images) < 5  # a few digits do occur twice


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_folder(folder, cache_gb):
    source = load_source(data_config(folder, cache_gb=cache_gb), "train")
    assert list(source.class_names) == ["goose", "robin"]
    batch = source.batch(np.arange(len(source)), np.zeros(len(source), bool))
    assert batch["label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch["image"].shape == (6, 16, 16, 3)
    assert (batch["image"][:3, 8, 8, 2] > 150).all() and (batch["image"][3:, 8, 8, 0] > 150).all()


def test_missing_folder_says_how_to_get_the_data(tmp_path):
    with pytest.raises(ConfigError, match=r"data.path = '.*nothing'.*train,val.*--config.data.path") as error:
        load_source(data_config(tmp_path / "nothing"), "train")
    assert "\n" not in str(error.value)


def test_class_of_val_that_train_lacks(folder):
    (folder / "val" / "heron").mkdir()
    with pytest.raises(ConfigError, match="heron"):
        load_source(data_config(folder), "val")


def test_unreadable_image_is_named(folder):
    (folder / "train" / "goose" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"goose/0\.jpg cannot be read"):
        load_source(data_config(folder), "train")


def test_transparent_pixels_are_white_and_exif_rotation_is_applied(tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", 16) == 255).all()
    image = Image.new("RGB", (16, 16))
    image.paste((255, 0, 0), (0, 0, 16, 8))  # upper half red
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to display
    image.save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png", 16)
    assert (turned[:, 8:, 0] == 255).all() and (turned[:, :8, 0] == 0).all()


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (16, 16), (5, 9), (33, 32)])
def test_center_crop_keeps_the_middle(size):
    ramp = np.zeros((size[1], size[0], 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, size[0]).astype(np.uint8)[None]
    out = center_crop(Image.fromarray(ramp), 16)
    assert out.shape == (16, 16, 3)
    assert abs(float(out[..., 0].mean()) - 127.5) < 8
