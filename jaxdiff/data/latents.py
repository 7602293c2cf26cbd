"""A data set's latents: encoded once, stored as (mean, logvar) of the posterior, drawn anew at every use."""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.data.pipeline import every_row
from jaxdiff.data.records import RecordTable, Table, check_settings, fits_in_memory, read_manifest
from jaxdiff.data.sources import Batch, Source
from jaxdiff.mesh import barrier, is_main, put_batch, to_host
from jaxdiff.models import Posterior


class Whitening(NamedTuple):
    """Per-channel mean and standard deviation [z] of a training set's latents."""

    mean: Sequence[float]
    std: Sequence[float]

    def whiten(self, z: Float[Array, "batch h w z"]) -> Float[Array, "batch h w z"]:
        """(z - mean) / std: about zero mean and unit variance, as the forward process expects."""
        return (z - np.array(self.mean, np.float32)[None, None, None]) / self._std

    def unwhiten(self, z: Float[Array, "batch h w z"]) -> Float[Array, "batch h w z"]:
        """The inverse of `whiten`."""
        return z * self._std + np.array(self.mean, np.float32)[None, None, None]

    @property
    def _std(self) -> Float[np.ndarray, "1 1 1 z"]:
        return np.array(self.std, np.float32)[None, None, None]


@dataclasses.dataclass(frozen=True)
class LatentSource:
    """A table of posteriors: row i * orientations is that of image i, the one after it that of the mirrored image."""

    table: Table
    orientations: int
    class_names: Sequence[str]
    checksum: str

    def __len__(self) -> int:
        return len(self.table) // self.orientations

    def batch(self, indices: Int[np.ndarray, " b"], mirror: Bool[np.ndarray, " b"] | None = None) -> Batch:
        """{"mean", "logvar": float32 [b, h, w, z], "label": int32 [b]}."""
        rows = indices * self.orientations
        return self.table.rows(rows if mirror is None else rows + mirror)


def params_hash(params: Any) -> str:
    """SHA-256 of a parameter tree's names, shapes and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def latent_root(folder: pathlib.Path, sources: Mapping[str, Source], mirrored: bool) -> pathlib.Path:
    """Where in the autoencoder's workdir `folder` the latents of a data set belong."""
    digest = hashlib.sha256(" ".join(source.checksum for source in sources.values()).encode()).hexdigest()
    return folder / "latents" / (digest[:12] + ("-mirrored" if mirrored else ""))


class Encoding(NamedTuple):
    """How images become latents of `shape` [h, w, z].

    encode: jitted, a batch on the devices -> Posterior. autoencoder: its `params_hash`. mirrored: mirrored images too.
    """

    encode: Callable[[Any], Posterior]
    autoencoder: str
    shape: tuple[int, int, int]
    mirrored: bool
    batch_size: int


def encode_sources(
    root: pathlib.Path,
    sources: Mapping[str, Source],
    encoding: Encoding,
    mesh: jax.sharding.Mesh,
    *,
    cache_gb: float,
    threads: int,
) -> tuple[dict[str, LatentSource], Whitening]:
    """The latents of the splits `sources`, encoded to `root` unless they are there; whitening is that of "train".

    Args: cache_gb, as in `fits_in_memory`, for a split, which `threads` threads read.
    Raises: ConfigError when the latents in `root` are of another autoencoder or of other images.
    """
    orientations = 1 + encoding.mirrored
    settings = {
        "autoencoder": encoding.autoencoder,
        "images": {split: source.checksum for split, source in sources.items()},
        "orientations": orientations,
    }
    if read_manifest(root) is None:
        _write(root, sources, encoding, settings, mesh)
    manifest = read_manifest(root) or {}
    check_settings(root, manifest, settings)
    columns = {
        "mean": (encoding.shape, np.float32),
        "logvar": (encoding.shape, np.float32),
        "label": ((), np.int32),
    }
    latents = {}
    for split, source in sources.items():
        records = RecordTable(root, split, columns)
        table: Table = records.in_memory(threads) if fits_in_memory(records.nbytes, cache_gb) else records
        latents[split] = LatentSource(table, orientations, source.class_names, f"{manifest['checksum']}/{split}")
    return latents, Whitening(**manifest["whitening"])


def _write(
    root: pathlib.Path,
    sources: Mapping[str, Source],
    encoding: Encoding,
    settings: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
) -> None:
    """All processes compute; the main one writes, and says which shards an earlier call has left to do."""
    import tensorflow_datasets as tfds

    from jaxdiff.data.writing import Note, Plan, Shard, locked, pending_shards, write_locked

    z = encoding.shape[-1]

    def generate(shard: Shard, note: Note) -> Iterator[Mapping[str, Any]]:
        sums, count = np.zeros((3, z)), 0
        for mean, logvar, label in _posteriors(sources[shard.split], encoding, shard.candidates, mesh):
            m, v = mean.astype(np.float64).reshape(-1, z), logvar.astype(np.float64).reshape(-1, z)
            sums += [m.sum(0), np.square(m).sum(0), np.exp(v).sum(0)]
            count += len(m)
            for row in zip(mean, logvar, label, strict=True):
                yield dict(zip(("mean", "logvar", "label"), row, strict=True))
        note |= {"split": shard.split, "sums": sums.tolist(), "count": count}

    def finish(notes: Sequence[Note]) -> Mapping[str, Any]:
        train = [note for note in notes if note["split"] == "train"]
        sums = np.sum([note["sums"] for note in train], axis=0)
        return {"whitening": whitening_of_sums(sums, sum(note["count"] for note in train))._asdict()}

    tensor = tfds.features.Tensor(shape=encoding.shape, dtype=np.float32, encoding="bytes")
    features = tfds.features.FeaturesDict({"mean": tensor, "logvar": tensor, "label": tfds.features.Scalar(np.int64)})
    rows = {split: len(source) * (1 + encoding.mirrored) for split, source in sources.items()}
    plan = Plan(features, rows, settings, 8 * int(np.prod(encoding.shape)), generate, finish)
    # Until all is written no other run may begin: all processes compute what the main one found to be missing.
    with locked(root) if is_main() else contextlib.nullcontext():
        pending = pending_shards(root, plan) if is_main() else []
        if jax.process_count() > 1:
            wanted = np.array([shard in pending for shard in plan.shards()])
            wanted = multihost_utils.broadcast_one_to_all(wanted)
            pending = [shard for shard, want in zip(plan.shards(), wanted, strict=True) if want]
        if is_main():
            write_locked(root, plan, threads=1, what="encoding")
        else:
            for shard in pending:
                for _ in _posteriors(sources[shard.split], encoding, shard.candidates, mesh):
                    pass
    barrier(f"encoded {root}")


def _posteriors(
    source: Source, encoding: Encoding, rows: range, mesh: jax.sharding.Mesh
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(mean, logvar, label) of the rows of a `LatentSource`, a batch of images at a time."""
    orientations = 1 + encoding.mirrored
    images = range(rows.start // orientations, rows.stop // orientations)
    mirror = put_batch(np.ones(encoding.batch_size, bool), mesh)
    for batch in every_row(source, mesh, batch_size=encoding.batch_size, rows=images):
        inputs = {"image": batch["image"]}
        views = [inputs, {**inputs, "mirror": mirror}][:orientations]
        posteriors = to_host([tuple(encoding.encode(view)) for view in views])
        label, weight = to_host((batch["label"], batch["weight"]))
        keep = weight > 0
        mean, logvar = (np.stack(arrays, 1)[keep] for arrays in zip(*posteriors, strict=True))
        yield mean.reshape(-1, *encoding.shape), logvar.reshape(-1, *encoding.shape), label[keep].repeat(orientations)


def whitening_of_sums(sums: Float[np.ndarray, "3 z"], count: int) -> Whitening:
    """Statistics of draws from `count` posteriors: var z = var mean + E exp(logvar).

    Args: sums, over the posteriors, of mean, mean^2 and exp(logvar).
    """
    mean, square, spread = sums / count
    return Whitening(mean.tolist(), np.sqrt(square - mean**2 + spread).tolist())
