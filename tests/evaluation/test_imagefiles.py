"""Images of any project: folders and .npz files, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from jaxdiff.errors import ConfigError
from jaxdiff.evaluation.imagefiles import read_images

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), np.uint8)


def write(folder, names, images=IMAGES):
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)


def test_a_folder_and_its_subfolders_in_the_order_of_paths(tmp_path):
    write(tmp_path, ["b/1.png", "b/0.png", "a/9.PNG", "c.png", "d.webp"], [*IMAGES[:4], IMAGES[4] * 0])
    (tmp_path / "notes.txt").write_text("not an image")
    images, labels = read_images(tmp_path, "eval.images")
    np.testing.assert_array_equal(images, [*IMAGES[[2, 1, 0, 3]], IMAGES[4] * 0])
    assert labels is None


def test_images_are_read_as_those_that_are_trained_on(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (6, 7), np.uint8)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a.png")  # 16 bits
    clear = np.concatenate([IMAGES[0], np.zeros((6, 7, 1), np.uint8)], axis=-1)
    Image.fromarray(clear).save(tmp_path / "b.png")
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves")
    images, _ = read_images(tmp_path, "eval.images")
    np.testing.assert_array_equal(images, [np.repeat(grey[..., None], 3, -1), np.full((6, 7, 3), 255)])


@pytest.mark.parametrize("names", [("arr_0", "arr_1"), ("images", "labels")])
def test_an_npz_as_adm_writes_it(tmp_path, names):
    np.savez(tmp_path / "s.npz", **dict(zip(names, (IMAGES, np.arange(5)), strict=True)))
    images, labels = read_images(tmp_path / "s.npz", "eval.images")
    np.testing.assert_array_equal(images, IMAGES)
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_what_holds_no_such_images_is_one_line(tmp_path):
    def fails(path, words):
        with pytest.raises(ConfigError, match=words) as error:
            read_images(path, "config.eval.images")
        assert "\n" not in str(error.value) and str(error.value).startswith("config.eval.images")

    fails(tmp_path / "none", "folder of images or an .npz")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "no images")
    write(tmp_path / "mixed", ["a.png", "b.png"], [IMAGES[0], IMAGES[1, :4]])
    fails(tmp_path / "mixed", r"one size; a.png 7x6, b.png 7x4")
    write(tmp_path / "broken", ["a.png"], IMAGES[:1])
    whole = (tmp_path / "broken" / "a.png").read_bytes()
    (tmp_path / "broken" / "a.png").write_bytes(whole[:-40])
    fails(tmp_path / "broken", "a.png cannot be read")
    (tmp_path / "broken" / "a.png").write_bytes(whole.replace(b"IDAT", b"\xff\xfe\xfd\xfc"))
    fails(tmp_path / "broken", "a.png cannot be read")
    (tmp_path / "text.npz").write_text("no archive")
    fails(tmp_path / "text.npz", "cannot be read as an .npz")
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, IMAGES)
    fails(tmp_path / "single.npz", "cannot be read as an .npz .*an .npy")
    np.savez(tmp_path / "none.npz", arr_0=IMAGES[:0])
    fails(tmp_path / "none.npz", r"arr_0 uint8 \[0, 6, 7, 3\]")
    np.savez(tmp_path / "float.npz", arr_0=IMAGES.astype(np.float32))
    fails(tmp_path / "float.npz", r"uint8 images .*arr_0 float32 \[5, 6, 7, 3\]")
    np.savez(tmp_path / "labels.npz", arr_0=IMAGES, arr_1=np.arange(4))
    fails(tmp_path / "labels.npz", "must be 5 integers")
