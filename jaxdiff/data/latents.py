"""A data set's latents: encoded once, stored as (mean, logvar) of the posterior, drawn anew at every use."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.config.files import write_json
from jaxdiff.data.pipeline import device_batches, eval_batches
from jaxdiff.data.sources import Batch, Source
from jaxdiff.errors import ConfigError
from jaxdiff.mesh import barrier, batch_sharding, is_main, to_host
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
    """Posteriors on disk: moments [orientations, N, h, w, 2z], the second orientation that of mirrored images."""

    moments: Float[np.ndarray, "o n h w 2z"]
    labels: Int[np.ndarray, " n"]
    class_names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Int[np.ndarray, " batch"], flip: Bool[np.ndarray, " batch"]) -> Batch:
        """{"mean", "logvar": float32 [B, h, w, z], "label": int32 [B]}."""
        mean, logvar = np.split(self.moments[flip.astype(int), indices], 2, axis=-1)
        return {"mean": mean, "logvar": logvar, "label": self.labels[indices]}


def params_hash(params: Any) -> str:
    """SHA-256 of a parameter tree's names, shapes and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def encode_source(
    source: Source,
    encode: Callable[[Any], Posterior],
    path: pathlib.Path,
    mesh: jax.sharding.Mesh,
    *,
    autoencoder: str,
    batch_size: int,
    flip: bool,
) -> LatentSource:
    """The latents of `source`, from `path` where a finished encoding lies there, else encoded to it.

    Args: encode, jitted, uint8 images -> Posterior; autoencoder, its `params_hash`; flip, mirrored ones as well.
    Raises: ConfigError when the latents at `path` are of another autoencoder or data set.
    """
    manifest_path, moments_path = path.with_suffix(".json"), path.with_suffix(".npy")
    wanted = {"autoencoder": autoencoder, "images": len(source), "orientations": 1 + flip}
    if not manifest_path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = _encode(source, encode, moments_path, mesh, batch_size, flip)
        if is_main():  # the manifest comes last: without it the encoding counts as not done
            moments = np.load(moments_path, mmap_mode="r")
            stats = measure_whitening(moments)._asdict()
            write_json(manifest_path, {**wanted, "whitening": stats, "labels": labels.tolist()})
        barrier(f"encoded {path}")
    manifest = json.loads(manifest_path.read_text())
    for name, value in wanted.items():
        if manifest[name] != value:
            raise ConfigError(
                f"{manifest_path}: these latents have {name} {manifest[name]}, wanted is {value}; "
                "delete them to encode again, or give another --workdir"
            )
    moments = np.load(moments_path, mmap_mode="r")
    return LatentSource(moments, np.array(manifest["labels"], np.int32), source.class_names)


def load_whitening(path: pathlib.Path) -> Whitening:
    """The statistics in the manifest of an encoded training set."""
    return Whitening(**json.loads(path.with_suffix(".json").read_text())["whitening"])


def measure_whitening(moments: Float[np.ndarray, "o n h w 2z"]) -> Whitening:
    """Mean and standard deviation per channel of draws from the posteriors: var z = var mean + E exp(logvar)."""
    z = moments.shape[-1] // 2
    total, square, spread, count = np.zeros(z), np.zeros(z), np.zeros(z), 0
    for orientation in moments:
        for first in range(0, len(orientation), 1024):
            part = orientation[first : first + 1024].astype(np.float64).reshape(-1, 2 * z)
            total += part[:, :z].sum(0)
            square += np.square(part[:, :z]).sum(0)
            spread += np.exp(part[:, z:]).sum(0)
            count += len(part)
    mean = total / count
    return Whitening(mean.tolist(), np.sqrt(square / count - mean**2 + spread / count).tolist())


def _encode(
    source: Source,
    encode: Callable[[Any], Posterior],
    path: pathlib.Path,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    flip: bool,
) -> Int[np.ndarray, " n"]:
    labels = np.zeros(len(source), np.int32)
    out = None
    for orientation in range(1 + flip):
        batches = eval_batches(
            source,
            batch_size=batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            flip=bool(orientation),
        )
        for i, batch in enumerate(device_batches(batches, batch_sharding(mesh))):
            mean, logvar, label = to_host((*encode(batch["image"]), batch["label"]))
            if not is_main():
                continue
            if out is None:
                shape = (1 + flip, len(source), *mean.shape[1:3], 2 * mean.shape[3])
                out = np.lib.format.open_memmap(path, "w+", np.float32, shape)
            rows = slice(i * batch_size, min((i + 1) * batch_size, len(source)))
            out[orientation, rows] = np.concatenate([mean, logvar], -1)[: rows.stop - rows.start]
            labels[rows] = label[: rows.stop - rows.start]
    if out is not None:
        out.flush()
    return labels
