"""Samples on the host: which labels they have, and the files that hold them."""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from jaxdiff import images
from jaxdiff.config import files
from jaxdiff.config.require import require
from jaxdiff.data.sources import Source

WORDNET_ID = re.compile(r"^n\d{8}[_ -]")  # class folders are called n01558993_robin as well as robin


def label_names(config: ConfigDict, class_names: Sequence[str]) -> Sequence[str]:
    """The classes that the network of `config` can be asked for: the data set's, or none where it is unconditional."""
    return class_names if config.model.conditional else ()


def sample_labels(settings: ConfigDict, class_names: Sequence[str]) -> Int[np.ndarray, " num"]:
    """Labels of images 0..num-1: the classes of `settings.classes` (names or numbers; empty = all), repeated in turn,
    or where these are more, `num` of them evenly spaced; 0 throughout where there are no classes.

    Raises: ConfigError naming the class that there is not.
    """
    names = list(class_names)
    chosen = []
    for word in filter(None, (part.strip() for part in settings.classes.split(","))):
        found = [k for k, name in enumerate(names) if word in (name, WORDNET_ID.sub("", name))]
        if len(found) == 1 or word in names:
            chosen.append(names.index(word) if word in names else found[0])
        else:
            some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            known = word.isdecimal() and int(word) < len(names)
            require(known, "sample.classes", word, f"a number in 0..{len(names) - 1} or one of the names {some}")
            chosen.append(int(word))
    classes = np.array(chosen or range(len(names)), np.int32)
    if settings.num < len(classes):
        return classes[np.arange(settings.num) * len(classes) // settings.num]
    return np.resize(classes, settings.num)


def columns(labels: Int[np.ndarray, " n"]) -> int:
    """Columns of a grid: a class to each where there are at most 20 in turn, else 10."""
    period = len(np.unique(labels))
    return min(len(labels), period if 1 < period <= 20 else 10)


def save_real(path: pathlib.Path, source: Source, most: int = 300) -> None:
    """Write as many images of each class, up to 8 and to `most` in all, as are found among the first of `source` in a
    fixed random order: arr_0 images, arr_1 labels, class_names."""
    each = max(1, min(8, most // len(source.class_names)))
    tried = np.random.default_rng(0).permutation(len(source))[: 4 * each * len(source.class_names)]
    batch = source.batch(np.sort(tried))
    label = batch["label"]
    rank = np.array([np.sum(label[:k] == own) for k, own in enumerate(label)])  # how many of its class come before
    kept = np.flatnonzero(rank < each)
    kept = kept[np.lexsort((rank[kept], label[kept]))]
    path.parent.mkdir(parents=True, exist_ok=True)
    names = np.array(list(source.class_names), dtype=str)
    np.savez_compressed(path, arr_0=batch["image"][kept], arr_1=label[kept], class_names=names)


def save_samples(
    path: pathlib.Path,
    samples: UInt8[np.ndarray, "n h w 3"],
    labels: Int[np.ndarray, " n"] | None,
    settings: ConfigDict,
) -> pathlib.Path:
    """Write the grid `path`.png, the config fields `sample` as `path`.json, and the images in `settings.format`:
    `path`.npz (arr_0 images, arr_1 labels) or a folder `path` of PNGs. `labels` are None where there are none.

    Names that are taken get a number, so that nothing is overwritten. Returns the path of the grid.
    """
    sheet = images.fresh_path(path.with_name(path.name + ".png"), (".json", ".npz", ""))
    images.save_png(sheet, images.grid(samples, columns(np.zeros(len(samples)) if labels is None else labels)))
    base = sheet.with_suffix("")
    files.write_json(base.with_name(base.name + ".json"), settings.to_dict())
    if settings.format == "npz":
        named: dict[str, Any] = {} if labels is None else {"arr_1": labels}
        np.savez(base.with_name(base.name + ".npz"), arr_0=samples, **named)
    else:
        for k, image in enumerate(samples):
            images.save_png(base / (f"{k:06d}" + ("" if labels is None else f"-class{labels[k]}") + ".png"), image)
    return sheet
