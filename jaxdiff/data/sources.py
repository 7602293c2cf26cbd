"""Where images come from. A new source is one function here and one line in `SOURCES`."""

import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image, ImageOps

from jaxdiff.errors import ConfigError
from jaxdiff.mesh import say

Batch = dict[str, np.ndarray]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Source(Protocol):
    """A finite, randomly readable data set; `batch` gives {"image": uint8 [B,H,W,3], "label": int32 [B]}."""

    @property
    def class_names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def batch(self, indices: Int[np.ndarray, " batch"], flip: Bool[np.ndarray, " batch"]) -> Batch:
        """Rows `indices`, those where `flip` is set mirrored left to right."""
        ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images in memory: uint8 [N, H, W, 3] and int32 labels [N]."""

    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int[np.ndarray, " n"]
    class_names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Int[np.ndarray, " batch"], flip: Bool[np.ndarray, " batch"]) -> Batch:
        images = self.images[indices]
        images[flip] = images[flip, :, ::-1]
        return {"image": images, "label": self.labels[indices]}


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Image files, decoded, cropped and resized when they are read."""

    files: Sequence[pathlib.Path]
    labels: Int[np.ndarray, " n"]
    class_names: Sequence[str]
    image_size: int

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Int[np.ndarray, " batch"], flip: Bool[np.ndarray, " batch"]) -> Batch:
        images = np.stack([read_image(self.files[i], self.image_size) for i in indices])
        images[flip] = images[flip, :, ::-1]
        return {"image": images, "label": self.labels[indices]}

    def in_memory(self, threads: int) -> ArraySource:
        """All images decoded once by `threads` threads."""
        shape = (len(self), self.image_size, self.image_size, 3)
        images = np.empty(shape, np.uint8)

        def fill(i: int) -> None:
            images[i] = read_image(self.files[i], self.image_size)

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(fill, range(len(self))):
                pass
        return ArraySource(images, self.labels, self.class_names)


def read_image(path: pathlib.Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Decode a file to RGB, rotated as its EXIF tag says, on white where transparent, cropped to size x size.

    Raises: ConfigError naming the file when it cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                image = Image.new("RGBA", rgba.size, "white")
                image.alpha_composite(rgba)
            return center_crop(image.convert("RGB"), size)
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"data.path: {path} cannot be read as an image ({error}); remove or replace it") from None


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Resize the short side to `size` (halvings with a box filter, then bicubic) and crop the centre square.

    Source: the preprocessing of ADM (arXiv 2105.05233), on whose reference statistics FID is compared.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = max(size, round(image.width * scale)), max(size, round(image.height * scale))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def digits(data: Any, split: str) -> ArraySource:
    """scikit-learn's 1,797 handwritten 8x8 digits, enlarged with a bicubic filter: 1,500 train, 297 val."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    rows = np.arange(len(bunch.target))
    train, val = train_test_split(rows, test_size=297, random_state=0, stratify=bunch.target)
    rows = np.sort(train if split == "train" else val)
    small = np.round(bunch.images[rows] * (255 / 16)).astype(np.uint8)
    size = (data.image_size, data.image_size)
    images = np.stack([np.asarray(Image.fromarray(im).resize(size, Image.Resampling.BICUBIC)) for im in small])
    images = np.repeat(images[..., None], 3, axis=-1)
    return ArraySource(images, bunch.target[rows].astype(np.int32), [str(name) for name in bunch.target_names])


def folder(data: Any, split: str) -> Source:
    """Class folders `path/{train,val}/<class>/*.{jpg,jpeg,png,webp}`; classes are the sorted names under train.

    Decoded once into memory where that takes no more than `data.cache_gb`, else at every reading.

    Raises: ConfigError when a folder is missing or empty, or when val has a class that train lacks.
    """
    root = pathlib.Path(data.path)
    names = _class_folders(root, "train")
    here = _class_folders(root, split)
    if unknown := sorted(set(here) - set(names)):
        raise ConfigError(f"data.path: {root / split} has the class {unknown[0]!r}, which {root / 'train'} lacks")
    files, labels = [], []
    for name in here:
        found = sorted(p for p in (root / split / name).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        files += found
        labels += [names.index(name)] * len(found)
    if not files:
        raise ConfigError(f"data.path: no {', '.join(IMAGE_SUFFIXES)} files in {root / split}/<class>/")
    source = FileSource(files, np.array(labels, np.int32), names, data.image_size)
    if len(files) * data.image_size**2 * 3 <= data.cache_gb * 1e9:
        say(f"decoding {len(files):,} images of {root / split} into memory")
        return source.in_memory(data.threads)
    return source


def _class_folders(root: pathlib.Path, split: str) -> list[str]:
    if not (root / split).is_dir():
        raise ConfigError(
            f"data.path = {str(root)!r}: there is no folder {root / split}. Expected are class folders of images, "
            "{train,val}/<class>/*.jpg; give yours with --config.data.path=FOLDER. ImageNet-100 is distributed in this "
            "layout (e.g. as 'ambityga/imagenet100' on Kaggle; merge its train.X* folders into train/)"
        )
    return sorted(p.name for p in (root / split).iterdir() if p.is_dir())


SOURCES: Mapping[str, Callable[[Any, str], Source]] = {"digits": digits, "folder": folder}


def load_source(data: Any, split: str) -> Source:
    """The "train" or "val" split of the data set that the config fields `data` (source, path, ...) name."""
    return SOURCES[data.source](data, split)
