"""Images to be scored, from files of any project."""

import concurrent.futures
import pathlib

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, UnidentifiedImageError

from jaxdiff.data.npz import read_npz
from jaxdiff.errors import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_images(path: pathlib.Path, field: str) -> tuple[UInt8[np.ndarray, "n h w 3"], Int[np.ndarray, " n"] | None]:
    """The images, and the labels where there are any, of a folder or of an .npz as ADM writes it.

    A folder's images lie in it and in its subfolders, and are taken in the order of their paths. An .npz has images as
    arr_0 (or images), labels as arr_1 (or labels).
    Raises: ConfigError beginning with `field` for a path without images, what is not readable, or images of several
    sizes.
    """
    if path.is_dir():
        return _folder(path, field), None
    if not path.is_file():
        raise ConfigError(f"{field} = {str(path)!r}: must be a folder of images or an .npz file")
    images, labels, _ = read_npz(path, field)
    return images, labels


def _folder(path: pathlib.Path, field: str) -> UInt8[np.ndarray, "n h w 3"]:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise ConfigError(f"{field} = {str(path)!r}: no images ({', '.join(SUFFIXES)}) in this folder")

    def size(file: pathlib.Path) -> tuple[int, int]:
        try:
            with Image.open(file) as image:
                return image.size
        except (OSError, UnidentifiedImageError) as error:
            raise ConfigError(f"{field}: {file} cannot be read as an image ({error})") from None

    width, height = size(files[0])
    images = np.empty((len(files), height, width, 3), np.uint8)

    def read(k: int) -> None:
        if (other := size(files[k])) != (width, height):
            sizes = f"{files[0].name} {width}x{height}, {files[k].name} {other[0]}x{other[1]}"
            raise ConfigError(f"{field}: the images of {path} must have one size; {sizes}")
        try:
            with Image.open(files[k]) as image:
                images[k] = np.asarray(image.convert("RGB"))
        except OSError as error:
            raise ConfigError(f"{field}: {files[k]} cannot be read as an image ({error})") from None

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(read, range(len(files))))
    return images
