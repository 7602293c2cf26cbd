"""Collections of image files that are decoded by us: class folders, and TFDS data sets."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from jaxdiff.data.decode import Unreadable, decode_into
from jaxdiff.errors import ConfigError, shortened

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
UNWANTED = -1  # label of an image whose class was not asked for


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """Encoded images of a split, by number.

    read(i): bytes and label of image i, which is `name(i)` in messages. fingerprint: changes when an image does.
    ignored: how many files were passed over, by suffix. share: of the classes wanted; below 1 some labels are UNWANTED.
    """

    where: str
    count: int
    class_names: Sequence[str]
    fingerprint: str
    read: Callable[[int], tuple[bytes, int]]
    name: Callable[[int], str]
    ignored: Mapping[str, int] = dataclasses.field(default_factory=dict)
    share: float = 1.0

    def __len__(self) -> int:
        return self.count

    def decode(self, i: int, out: UInt8[np.ndarray, "size size 3"]) -> int:
        """Decode image i into `out`; its label. Raises: ConfigError naming the image when it cannot be read."""
        try:
            data, label = self.read(i)
            decode_into(data, out)
        except (OSError, Unreadable) as error:
            raise ConfigError(
                f"data.path: {self.name(i)} cannot be read as an image ({reason(error)}); remove or replace it, or let "
                "--mode=prepare leave out and list all such files"
            ) from None
        return label

    def decode_all(self, size: int, threads: int) -> tuple[UInt8[np.ndarray, "n size size 3"], Int[np.ndarray, " n"]]:
        """All images and labels, decoded by `threads` threads."""
        images, labels = np.empty((len(self), size, size, 3), np.uint8), np.empty(len(self), np.int32)

        def fill(first: int) -> None:
            for i in range(first, min(first + 64, len(self))):
                labels[i] = self.decode(i, images[i])

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(0, len(self), 64)))
        return images, labels


def reason(error: OSError | Unreadable) -> str:
    """Why an image could not be read, for people."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


@dataclasses.dataclass(frozen=True)
class _Files:
    """What `class_folder` reads: picklable, for worker processes."""

    paths: Sequence[str]
    labels: Sequence[int]

    def read(self, i: int) -> tuple[bytes, int]:
        with io.FileIO(self.paths[i]) as file:  # without the buffer of open(), which takes a third longer
            return file.readall(), self.labels[i]

    def name(self, i: int) -> str:
        return os.fsencode(self.paths[i]).decode("utf-8", "backslashreplace")


def class_folder(data: Any, split: str) -> EncodedImages:
    """Files `data.path`/{train,val}/<class>/*.{jpg,jpeg,png,webp}, classes and files in the order of sorted names.

    Raises: ConfigError when a folder is missing, a class of train has no image, or val has a class that train lacks.
    """
    root = pathlib.Path(data.path)
    folders = _class_folders(root, "train")
    here = _class_folders(root, split)
    if unknown := sorted(set(here) - set(folders)):
        raise ConfigError(f"data.path: {root / split} has the class {unknown[0]!r}, which {root / 'train'} lacks")
    paths: list[str] = []
    labels: list[int] = []
    ignored: Counter[str] = Counter()
    digest = hashlib.sha256(json.dumps(folders).encode())
    for name in here:
        files = []
        with os.scandir(root / split / name) as entries:
            for entry in entries:
                if _is_image(entry.name):
                    files.append(entry)
                else:
                    ignored[os.path.splitext(entry.name)[1].lower() or entry.name] += 1
        if not files and split == "train":
            raise ConfigError(
                f"data.path: no {', '.join(IMAGE_SUFFIXES)} files in {root / split / name}; remove it, or add some"
            )
        for entry in sorted(files, key=lambda e: e.name):
            with contextlib.suppress(OSError):  # such as a link to nowhere: reading it will tell
                stat = entry.stat()
                digest.update(
                    f"{name}/{entry.name} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape")
                )
            paths.append(entry.path)
            labels.append(folders.index(name))
    if not paths:
        raise ConfigError(f"data.path: no {', '.join(IMAGE_SUFFIXES)} files in {root / split}/<class>/")
    source = _Files(paths, labels)
    names = _readable_names(root, folders)
    return EncodedImages(
        str(root / split), len(paths), names, digest.hexdigest(), source.read, source.name, dict(ignored)
    )


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def count_files(root: pathlib.Path, splits: Sequence[str]) -> int:
    """The images in class folders, by their names alone."""
    folders = [folder for split in splits for folder in (root / split).glob("*/")]
    return sum(_is_image(name) for folder in folders if not folder.name.startswith(".") for name in os.listdir(folder))


def _class_folders(root: pathlib.Path, split: str) -> list[str]:
    if not (root / split).is_dir():
        raise ConfigError(
            f"data.path = {str(root)!r}: there is no folder {root / split}. Expected are class folders of images, "
            "{train,val}/<class>/*.jpg; give yours with --config.data.path=FOLDER. ImageNet-100 is distributed in this "
            "layout (e.g. as 'ambityga/imagenet100' on Kaggle; merge its train.X* folders into train/)"
        )
    found = sorted(p.name for p in (root / split).iterdir() if p.is_dir() and not p.name.startswith("."))
    for name in found:
        if name != name.encode(errors="replace").decode():  # it has what stands for bytes that are not UTF-8
            raise ConfigError(f"data.path: the class folder {name!r} in {root / split} must have a name in UTF-8")
    if not found:
        raise ConfigError(f"data.path: {root / split} has no class folders; expected is {{train,val}}/<class>/*.jpg")
    return found


def _readable_names(root: pathlib.Path, folders: Sequence[str]) -> list[str]:
    """Folder names; the first word of Labels.json for those that it explains and no other class shares.

    ImageNet-100 comes with that file: {"n01558993": "robin, American robin, Turdus migratorius", ...}.
    """
    path = root / "Labels.json"
    if not path.is_file():
        return list(folders)
    try:
        said = {str(k): str(v).split(",")[0].strip() for k, v in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise ConfigError(f'data.path: {path} must be a JSON object {{"folder": "name, ..."}} ({error})') from None
    names = [said.get(folder) or folder for folder in folders]
    return [name if names.count(name) == 1 else folder for name, folder in zip(names, folders, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Examples:
    """What `tfds_images` reads."""

    examples: Any
    where: str
    labels: Mapping[int, int]  # of the data set -> ours

    def read(self, i: int) -> tuple[bytes, int]:
        example = self.examples[i]
        return example["image"], self.labels.get(int(example["label"]), UNWANTED)

    def name(self, i: int) -> str:
        return f"image {i} of {self.where}"


def tfds_images(data: Any, split: str) -> EncodedImages:
    """A split of the TFDS data set `data.name` below `data.path` (empty: TFDS's own folder), with image and label.

    train is its "train"; val its "validation", or "test", or else the last twentieth of "train". `data.classes` names a
    file with a class to a line, of which the data set is to consist.
    Raises: ConfigError when TFDS does not know it or cannot make it, or when it has other features or another format.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(data.name, data_dir=data.path or None)
        if not builder.is_prepared():
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # TFDS raises all sorts of things
        raise ConfigError(
            f"data.name = {data.name!r}: TFDS cannot provide it ({' '.join(str(error).split())[:300]}). To make (not "
            "to read) most data sets of its catalogue needs TensorFlow: run `tfds build NAME --file_format="
            "array_record` where that is installed, and give the data folder as --config.data.path"
        ) from None
    features, splits = dict(builder.info.features.items()), builder.info.splits
    if not isinstance(features.get("image"), tfds.features.Image) or not isinstance(
        features.get("label"), tfds.features.ClassLabel
    ):
        raise ConfigError(
            f"data.name = {data.name!r}: must have the features image (Image) and label (ClassLabel); it has "
            f"{', '.join(f'{k} ({type(v).__name__})' for k, v in features.items())}"
        )
    if "train" not in splits:
        raise ConfigError(f"data.name = {data.name!r}: has no split train, only {', '.join(splits)}")
    held_out = next((name for name in ("validation", "test") if name in splits), None)
    part = {"train": "train" if held_out else "train[:95%]", "val": held_out or "train[95%:]"}[split]
    names = features["label"].names
    wanted = list(names) if not data.classes else read_class_file(pathlib.Path(data.classes), names)
    labels = {names.index(name): k for k, name in enumerate(wanted)}
    try:
        examples = builder.as_data_source(part, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError:
        raise ConfigError(
            f"data.name = {data.name!r}: {builder.data_dir} is not in ArrayRecord format; convert it with `python -m "
            f"tensorflow_datasets.scripts.convert_format --to=array_record --dataset_dir={builder.data_dir}`"
        ) from None
    where = f"{builder.info.full_name}, {part}"
    digest = hashlib.sha256(json.dumps([where, len(examples), wanted]).encode()).hexdigest()
    source = _Examples(examples, where, labels)
    return EncodedImages(where, len(examples), wanted, digest, source.read, source.name, share=len(wanted) / len(names))


def read_class_file(path: pathlib.Path, known: Sequence[str] | None = None) -> list[str]:
    """Names in a file with one to a line (what follows a space is a comment), sorted.

    Raises: ConfigError when there is no such file, or a name in it is not among `known`, if given, or comes twice.
    """
    if not path.is_file():
        raise ConfigError(f"data.classes = {str(path)!r}: there is no such file; expected is a class name to a line")
    names = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    for number, name in enumerate(names):
        if known is not None and name not in known:
            some = shortened(known)
            raise ConfigError(f"data.classes: {path} names {name!r}, which is no class of the data set ({some})")
        if name in names[:number]:
            raise ConfigError(f"data.classes: {path} names {name!r} twice")
    if not names:
        raise ConfigError(f"data.classes: {path} is empty")
    return sorted(names)
