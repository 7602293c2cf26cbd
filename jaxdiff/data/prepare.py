"""--mode=prepare: a data set's images decoded, cropped and resized once, and stored as ArrayRecord."""

import hashlib
import json
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxdiff.config.require import require
from jaxdiff.data.decode import PROCEDURE, Unreadable, decode_into
from jaxdiff.data.encoded import UNWANTED, EncodedImages, class_folder, reason, tfds_images
from jaxdiff.data.records import Manifest, read_manifest
from jaxdiff.data.sources import prepared_root
from jaxdiff.data.writing import Note, Plan, Shard, write_records
from jaxdiff.errors import ConfigError

FIND = {"folder": class_folder, "tfds": tfds_images}
SPLITS = ("train", "val")


def prepare(data: Any, *, threads: int | None = None) -> tuple[pathlib.Path, Manifest]:
    """Store the data set that the config fields `data` name as records of `data.image_size`; their folder and manifest.

    Images that cannot be decoded are left out and listed in rejected.jsonl. Begun again after an interruption it goes
    on; where the records are there already and nothing has changed, it does nothing.
    Raises: ConfigError when more than the share `data.max_rejected` is left out, or a class has no image left, or as
    `class_folder`, `tfds_images` and `write_records`.
    """
    require(data.source in FIND, "data.source", data.source, f"one of {', '.join(FIND)}; the others need no preparing")
    images = {split: FIND[data.source](data, split) for split in SPLITS}
    root = prepared_root(data)
    plan = image_plan(images, data.image_size, data.max_rejected, root)
    if read_manifest(root) is None:
        _check_space(root, plan, images["train"].share)
    return root, write_records(root, plan, threads=threads or cores(), what="preparing")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def image_plan(images: Mapping[str, EncodedImages], size: int, max_rejected: float, root: pathlib.Path) -> Plan:
    """What `prepare` writes: the features image, label and file of every image that can be decoded."""
    class_names = list(images["train"].class_names)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Tensor(shape=(size, size, 3), dtype=np.uint8, encoding="bytes"),
            "label": tfds.features.ClassLabel(names=class_names),
            "file": tfds.features.Text(),
        }
    )

    def generate(shard: Shard, note: Note) -> Iterator[Mapping[str, Any]]:
        source = images[shard.split]
        image = np.empty((size, size, 3), np.uint8)
        counts: Counter[str] = Counter()
        rejected = []
        for i in shard.candidates:
            name = source.name(i)
            try:
                encoded, label = source.read(i)
                if label == UNWANTED:
                    continue
                decode_into(encoded, image)
            except (OSError, Unreadable) as error:
                rejected.append({"split": shard.split, "file": name, "reason": reason(error)})
                continue
            counts[str(label)] += 1
            yield {"image": image, "label": label, "file": name}
        note |= {"split": shard.split, "counts": counts, "rejected": rejected}

    def finish(notes: Sequence[Note]) -> Mapping[str, Any]:
        rejected = [line for note in notes for line in note["rejected"]]
        counts: dict[str, Counter[str]] = {split: Counter() for split in images}
        for note in notes:
            counts[note["split"]].update(note["counts"])
        listed = root / "rejected.jsonl"
        listed.write_text("".join(json.dumps(line) + "\n" for line in rejected))
        total = len(rejected) + sum(c.total() for c in counts.values())
        if len(rejected) > max_rejected * total:
            share, first = len(rejected) / total, rejected[0]
            raise ConfigError(
                f"data.max_rejected = {max_rejected:g}: {len(rejected)} of {total:,} images ({share:.2%}) cannot be "
                f"used, such as {first['file']} ({first['reason']}); all are listed in {listed}. Mend or remove "
                "them, or allow a larger share"
            )
        for label, name in enumerate(class_names):
            if not counts["train"][str(label)]:
                raise ConfigError(f"data.path: the class {name!r} has no usable training image; see {listed}")
        return {
            "source": {split: source.where for split, source in images.items()},
            "classes": class_names,
            "chosen": images["train"].share < 1,
            "images": {split: c.total() for split, c in counts.items()},
            "per_class": {split: [c[str(k)] for k in range(len(class_names))] for split, c in counts.items()},
            "rejected": len(rejected),
            "ignored_files": {split: dict(source.ignored) for split, source in images.items()},
        }

    prints = {split: source.fingerprint for split, source in images.items()}
    settings = {
        "image_size": size,
        "procedure": PROCEDURE,
        "fingerprint": hashlib.sha256(json.dumps([prints, class_names]).encode()).hexdigest(),
    }
    return Plan(features, {s: len(images[s]) for s in SPLITS}, settings, size**2 * 3, generate, finish)


def _check_space(root: pathlib.Path, plan: Plan, share: float) -> None:
    there = next(p for p in (root.resolve(), *root.resolve().parents) if p.exists())
    done = sum(p.stat().st_size for p in root.glob("partial/*.array_record"))
    need, free = share * sum(plan.splits.values()) * plan.row_bytes - done, shutil.disk_usage(there).free
    if need > free:
        raise ConfigError(
            f"{root}: up to {need / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB free; make room, or name a folder "
            "elsewhere with --config.data.prepared"
        )
