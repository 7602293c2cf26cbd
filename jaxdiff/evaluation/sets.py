"""Sets of images that are compared, and their features."""

import functools
import hashlib
import json
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, UInt8

from jaxdiff import mesh as meshes
from jaxdiff.config import files
from jaxdiff.data import every_row
from jaxdiff.data.sources import Batch, Source
from jaxdiff.evaluation.extractors import Extractor
from jaxdiff.evaluation.frechet import Moments, Sums

FORMAT = 1  # of what is cached; another number makes all of it anew
BATCH = {"gpu": 128}  # images at a time on a device
CPU_BATCH = 32


class FeatureSet(NamedTuple):
    """Features of a set of images, on the host, and the moments of those that are too many to keep."""

    pooled: Float[np.ndarray, "n d"]
    logits: Float[np.ndarray, "n k"]
    spatial: Moments


class Subset(NamedTuple):
    """Some images of a source, as a source."""

    source: Source
    rows: Int[np.ndarray, " n"]

    @property
    def class_names(self) -> Sequence[str]:
        return self.source.class_names

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.source.checksum.encode() + self.rows.astype(np.int64).tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Int[np.ndarray, " b"], mirror: Bool[np.ndarray, " b"] | None = None) -> Batch:
        return self.source.batch(self.rows[indices], mirror)


class ImageSet:
    """The images of a source, with features that are computed when they are first asked for.

    Args: name, in messages; spatial, whether there will be spatial features; cached, whether features are kept on
    disk, in `files.cache_root`, by the hashes of content and extractor.
    """

    def __init__(
        self, source: Any, extractor: Extractor, mesh: Mesh, name: str, *, spatial: bool = False, cached: bool = True
    ) -> None:
        self.source, self.name = source, name
        self._extractor, self._mesh, self._spatial, self._cached = extractor, mesh, spatial, cached

    def __len__(self) -> int:
        return len(self.source)

    def images(self, rows: Int[np.ndarray, " n"] | None = None) -> UInt8[np.ndarray, "n h w 3"]:
        """The images, or some of them."""
        return self.source.batch(np.arange(len(self)) if rows is None else rows)["image"]

    @functools.cached_property
    def features(self) -> FeatureSet:
        """Features of all images, in their order."""
        if not self._cached:
            return self._extract()
        e = self._extractor
        what = [FORMAT, self.source.checksum, len(self), e.name, e.weights, e.resize, self._spatial]
        path = files.cache_root() / "features" / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()}.npz"
        stored = self._load(path)
        if meshes.all_agree(stored is not None) and stored is not None:
            return stored
        features = self._extract()
        if meshes.is_main():
            try:
                _save(features, path)
            except OSError as error:
                meshes.say(f"features of {self.name} are not kept: {path.parent}: {error.strerror}")
        return features

    def _extract(self) -> FeatureSet:
        mesh, spatial = self._mesh, Moments(f"spatial features of {self.name}")
        params = meshes.put_replicated(self._extractor.params, mesh)
        size = BATCH.get(jax.default_backend(), CPU_BATCH) * mesh.size
        pooled, logits = [], []
        for batch in every_row(self.source, mesh, batch_size=size):
            features = _program(self._extractor.apply)(params, batch["image"])
            if self._spatial:
                spatial.add(features.spatial, batch["weight"])
            rows, classes, weight = meshes.to_host((features.pooled, features.logits, batch["weight"]))
            pooled.append(rows[weight > 0])
            logits.append(classes[weight > 0])
        return FeatureSet(np.concatenate(pooled), np.concatenate(logits), spatial)

    def _load(self, path: pathlib.Path) -> FeatureSet | None:
        """What `_save` wrote; None where there is nothing, or nothing whole."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            sums = Sums(*(arrays[name] for name in Sums._fields)) if self._spatial else None
            moments = Moments(f"spatial features of {self.name}", sums)
            return FeatureSet(arrays["pooled"], arrays["logits"], moments)
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
            return None


@functools.cache
def _program(apply: Any) -> Any:
    return jax.jit(apply)


def _save(features: FeatureSet, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sums = features.spatial.sums
    arrays = {} if sums is None else {name: np.asarray(value) for name, value in sums._asdict().items()}
    with files.replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, pooled=features.pooled, logits=features.logits, **arrays)  # type: ignore[arg-type]
