"""Where images come from. A new source is one function here and one line in `SOURCES`."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from jaxdiff.data.decode import Unreadable, center_crop
from jaxdiff.data.encoded import EncodedImages, class_folder, count_files, read_class_file, tfds_images
from jaxdiff.data.npz import read_npz
from jaxdiff.data.records import MANIFEST, ArrayTable, Manifest, RecordTable, Table, fits_in_memory, read_manifest
from jaxdiff.errors import ConfigError
from jaxdiff.mesh import say

Batch = dict[str, np.ndarray]
HELD_OUT = 0.05  # of data that have no validation split of their own


class Source(Protocol):
    """A finite, randomly readable data set."""

    @property
    def class_names(self) -> Sequence[str]: ...

    @property
    def checksum(self) -> str:
        """SHA-256 that identifies the content."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: Int[np.ndarray, " b"], mirror: Bool[np.ndarray, " b"] | None = None) -> Batch:
        """{"image": uint8 [b, h, w, 3], "label": int32 [b]} of the rows `indices`.

        With `mirror` there is also {"mirror": bool [b]}, the images that are to be mirrored left to right, which the
        training step does (`images.from_batch`): it costs a GPU nothing, and a loader's core half its time.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Rows of a table with the columns image, uint8 [h, w, 3], and label."""

    table: Table
    class_names: Sequence[str]
    checksum: str

    def __len__(self) -> int:
        return len(self.table)

    def batch(self, indices: Int[np.ndarray, " b"], mirror: Bool[np.ndarray, " b"] | None = None) -> Batch:
        batch = self.table.rows(indices)
        return batch if mirror is None else {**batch, "mirror": mirror}


def array_source(
    images: UInt8[np.ndarray, "n h w 3"], labels: Int[np.ndarray, " n"], class_names: Sequence[str]
) -> ImageSource:
    """A source of images in memory."""
    digest = hashlib.sha256(json.dumps(list(class_names)).encode())
    for array in (images, labels.astype(np.int32)):
        digest.update(array.tobytes())
    table = ArrayTable({"image": images, "label": labels.astype(np.int32)})
    return ImageSource(table, list(class_names), digest.hexdigest())


def digits(data: Any, split: str) -> ImageSource:
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
    return array_source(images, bunch.target[rows], [str(name) for name in bunch.target_names])


def npz(data: Any, split: str) -> ImageSource:
    """An .npz of uint8 images [N, H, W, 3] (arr_0 or images) and perhaps labels [N] (arr_1 or labels) and class_names.

    A twentieth of the images, drawn once and for all, is the val split. Images of another size are cropped and resized.

    Raises: ConfigError when the file is missing, broken or holds something else.
    """
    path = pathlib.Path(data.path)
    if not path.is_file():
        raise ConfigError(f"data.path = {str(path)!r}: there is no such file; expected is an .npz of uint8 images")
    images, labels, names = read_npz(path, "data.path")
    if len(images) < 2:
        raise ConfigError(f"data.path: {path} must hold two images or more, of which one is held out; it has 1")
    if labels is None:
        labels = np.zeros(len(images), np.int32)
    count = int(labels.max()) + 1 if names is None else len(names)
    if labels.min() < 0 or labels.max() >= count:
        raise ConfigError(f"data.path: labels in {path} must be {len(images)} integers in 0..{count - 1}")
    class_names = names or [str(k) for k in range(count)]
    rows = _held_out(len(images), split)
    size = data.image_size
    if images.shape[1:3] == (size, size):
        chosen = images[rows]
    else:
        try:
            chosen = np.stack([center_crop(Image.fromarray(images[row]), size) for row in rows])
        except Unreadable as error:
            raise ConfigError(f"data.path: the images of {path} cannot be resized to {size} ({error})") from None
    return array_source(chosen, labels[rows], class_names)


def _held_out(count: int, split: str) -> Int[np.ndarray, " rows"]:
    order = np.random.default_rng(0).permutation(count)
    val = max(1, round(HELD_OUT * count))
    return np.sort(order[:val] if split == "val" else order[val:])


def folder(data: Any, split: str) -> Source:
    """Class folders `path/{train,val}/<class>/*.{jpg,jpeg,png,webp}`; classes are the sorted names under train."""
    if split == "train":
        _say_what_came(pathlib.Path(data.path), prepared_root(data))
    return _prepared_or_encoded(data, split, class_folder)


def _say_what_came(path: pathlib.Path, root: pathlib.Path) -> None:
    """Say so where `path` has more or fewer images now than when the records in `root` were made of it."""
    manifest = read_manifest(root)
    if manifest is None or root == path or not (path / "train").is_dir():
        return
    were, are = sum(manifest["images"].values()) + manifest["rejected"], count_files(path, list(manifest["images"]))
    if are != were:
        now = f"it has {are:,} now; to use these, remove {root} and run --mode=prepare"
        say(f"{root} has the {were:,} images that {path} had when it was prepared; {now}")


def tfds(data: Any, split: str) -> Source:
    """The TFDS data set `data.name`, under the TFDS folder `data.path`, in ArrayRecord format."""
    return _prepared_or_encoded(data, split, tfds_images)


def _prepared_or_encoded(data: Any, split: str, find: Callable[[Any, str], EncodedImages]) -> Source:
    """The records that --mode=prepare made where there are any; else images that are decoded when they are read.

    Either is kept in memory where it fits (`fits_in_memory`).
    """
    root = prepared_root(data)
    manifest = read_manifest(root)
    if manifest is not None:
        return prepared(data, split, root, manifest)
    encoded = find(data, split)
    size = data.image_size
    if encoded.share < 1:
        raise ConfigError(f"data.classes = {data.classes!r}: run --mode=prepare first, which picks out these classes")
    if fits_in_memory(len(encoded) * size**2 * 3, data.cache_gb):
        say(f"decoding {len(encoded):,} images of {encoded.where} into memory")
        return array_source(*encoded.decode_all(size, data.threads), encoded.class_names)
    say(f"{encoded.where}: decoded at every reading; --mode=prepare makes that faster, and lists what is unreadable")
    digest = hashlib.sha256(f"{encoded.fingerprint} {size}".encode()).hexdigest()
    return ImageSource(DecodingTable(encoded, size), encoded.class_names, digest)


@dataclasses.dataclass(frozen=True)
class DecodingTable:
    """Encoded images, decoded, cropped and resized when they are read."""

    images: EncodedImages
    size: int

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, indices: Int[np.ndarray, " n"]) -> Batch:
        """The columns image and label. Raises: ConfigError naming the image that cannot be decoded."""
        images = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        labels = [self.images.decode(int(i), image) for i, image in zip(indices, images, strict=True)]
        return {"image": images, "label": np.array(labels, np.int32)}


def prepared_root(data: Any) -> pathlib.Path:
    """Folder of the prepared records of a data set: `data.prepared`, or one beside `data.path`."""
    if data.prepared:
        return pathlib.Path(data.prepared)
    if data.source == "tfds":
        return pathlib.Path("data") / f"{data.name.replace('/', '-').replace(':', '-')}-{data.image_size}px"
    path = pathlib.Path(data.path)
    if (path / MANIFEST).exists():  # a prepared folder was given
        return path
    beside = path.resolve() if path.name in ("", "..") else path
    return beside.with_name(f"{path.resolve().name}-{data.image_size}px")


def prepared(data: Any, split: str, root: pathlib.Path, manifest: Manifest) -> ImageSource:
    """A split of prepared records; ConfigError when they are of another size, or of other classes than chosen."""
    size = manifest["settings"]["image_size"]
    if size != data.image_size:
        raise ConfigError(f"data.image_size = {data.image_size}: {root} was prepared at {size}")
    chosen = read_class_file(pathlib.Path(data.classes)) if data.classes else []
    if sorted(manifest["classes"]) != chosen if chosen else manifest.get("chosen", False):
        raise ConfigError(
            f"data.classes = {data.classes!r}: {root} was prepared with other ones, {len(manifest['classes'])} in all; "
            "give the file that it was prepared with, or another --config.data.prepared"
        )
    if split not in manifest["shards"]:
        raise ConfigError(f"data.prepared: {root} has no {split} images")
    columns = {"image": ((size, size, 3), np.uint8), "label": ((), np.int32)}
    records = RecordTable(root, split, columns)
    table: Table = records
    if fits_in_memory(records.nbytes, data.cache_gb):
        table = records.in_memory(data.threads)
    return ImageSource(table, manifest["classes"], f"{manifest['checksum']}/{split}")


SOURCES: Mapping[str, Callable[[Any, str], Source]] = {"digits": digits, "folder": folder, "npz": npz, "tfds": tfds}


def load_source(data: Any, split: str) -> Source:
    """The "train" or "val" split of the data set that the config fields `data` (source, path, ...) name."""
    return SOURCES[data.source](data, split)
