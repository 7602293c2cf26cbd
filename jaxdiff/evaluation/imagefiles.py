"""Images to be scored, from files of any project."""

import concurrent.futures
import pathlib

import numpy as np
from jaxtyping import Int, UInt8

from jaxdiff.data.decode import Unreadable, open_image
from jaxdiff.data.encoded import reason
from jaxdiff.data.npz import read_npz
from jaxdiff.errors import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_images(path: pathlib.Path, field: str) -> tuple[UInt8[np.ndarray, "n h w 3"], Int[np.ndarray, " n"] | None]:
    """The images, and the labels where there are any, of a folder or of an .npz as ADM writes it.

    A folder's images lie in it and in its subfolders, are taken in the order of their paths, and are read as those that
    are trained on. An .npz has images as arr_0 (or images), labels as arr_1 (or labels).
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
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and p.name[0] != ".")
    if not files:
        raise ConfigError(f"{field} = {str(path)!r}: no images ({', '.join(SUFFIXES)}) in this folder")

    def read(file: pathlib.Path) -> UInt8[np.ndarray, "h w 3"]:
        try:
            return np.asarray(open_image(file.read_bytes()))
        except (OSError, Unreadable) as error:
            raise ConfigError(f"{field}: {file} cannot be read as an image ({reason(error)})") from None

    first = read(files[0])
    images = np.empty((len(files), *first.shape), np.uint8)

    def fill(k: int) -> None:
        image = read(files[k])
        if image.shape != first.shape:
            sizes = (
                f"{files[0].name} {first.shape[1]}x{first.shape[0]}, {files[k].name} {image.shape[1]}x{image.shape[0]}"
            )
            raise ConfigError(f"{field}: the images of {path} must have one size; {sizes}")
        images[k] = image

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(len(files))))
    return images
