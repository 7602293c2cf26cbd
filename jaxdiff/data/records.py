"""Rows of a data set by number: from arrays in memory, or from the ArrayRecord shards of a TFDS data set on disk."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int

from jaxdiff.config.files import read_json
from jaxdiff.errors import ConfigError

Rows = dict[str, np.ndarray]
Columns = Mapping[str, tuple[Sequence[int], Any]]  # name -> (shape, dtype) of a row's value
Manifest = Mapping[str, Any]
MANIFEST = "manifest.json"


class Table(Protocol):
    """Fixed columns of fixed shapes, readable by row number from several threads at a time."""

    def __len__(self) -> int: ...

    def rows(self, indices: Int[np.ndarray, " n"]) -> Rows:
        """Columns by name, with the rows `indices` along the first axis."""
        ...


@dataclasses.dataclass(frozen=True)
class ArrayTable:
    """Columns in memory (or memory-mapped)."""

    columns: Rows

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def rows(self, indices: Int[np.ndarray, " n"]) -> Rows:
        return {name: column[indices] for name, column in self.columns.items()}


_importing = threading.Lock()


def _example() -> Any:
    """TensorFlow's message type. TFDS imports it when it is first used, which two threads may not do at once."""
    with _importing:
        from tensorflow_datasets.proto import tf_example_pb2

        return tf_example_pb2.Example


class RecordTable:
    """A split of the finished records in a folder.

    Args: columns, features that are stored as bytes, or as one integer where the shape is ().
    """

    def __init__(self, root: pathlib.Path, split: str, columns: Columns) -> None:
        manifest = read_manifest(root)
        if manifest is None:
            raise ConfigError(f"{root}: no {MANIFEST} there, so nothing that was finished")
        self._root, self._columns = root, dict(columns)
        shards = manifest["shards"][split]
        self._files = [root / manifest["folder"] / shard["file"] for shard in shards]
        self._ends = np.cumsum([shard["rows"] for shard in shards])
        self._readers: list[ArrayRecordReader | None] = [None] * len(self._files)  # opened when they are first used
        _example()

    def __getstate__(self) -> dict[str, Any]:
        """Without the readers: each worker process opens its own."""
        return {**vars(self), "_readers": [None] * len(self._files)}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def rows(self, indices: Int[np.ndarray, " n"]) -> Rows:
        """As in `Table`. Raises: ConfigError naming the shard when it is damaged."""
        example = _example()
        out = {name: np.empty((len(indices), *shape), dtype) for name, (shape, dtype) in self._columns.items()}
        flat = {name: column.reshape(len(indices), -1) if column.ndim > 1 else column for name, column in out.items()}
        shards = np.searchsorted(self._ends, indices, side="right").tolist()
        for place, (index, shard) in enumerate(zip(indices.tolist(), shards, strict=True)):
            record = self._read(shard, index - (int(self._ends[shard - 1]) if shard else 0))
            values = example.FromString(record).features.feature
            for name, column in out.items():
                if column.ndim > 1:
                    flat[name][place] = np.frombuffer(values[name].bytes_list.value[0], column.dtype)
                else:
                    column[place] = values[name].int64_list.value[0]
        return out

    def _read(self, shard: int, position: int) -> bytes:
        reader = self._readers[shard]
        try:
            if reader is None:
                # Rows are read in no order, so reading ahead would be in vain.
                options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}
                reader = self._readers[shard] = ArrayRecordReader(str(self._files[shard]), **options)
            # One at a time: for several the reader starts threads of its own, at twice the cost.
            return reader.read([position])[0]
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            why = str(error).splitlines()[0]
            raise ConfigError(f"{self._files[shard]}: damaged ({why}); delete {self._root} and make it again") from None

    def in_memory(self, threads: int) -> ArrayTable:
        """All rows, read by `threads` threads."""
        columns = {name: np.empty((len(self), *shape), dtype) for name, (shape, dtype) in self._columns.items()}

        def fill(first: int) -> None:
            part = np.arange(first, min(first + 256, len(self)))
            for name, values in self.rows(part).items():
                columns[name][part] = values

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(0, len(self), 256)))
        return ArrayTable(columns)

    @property
    def nbytes(self) -> int:
        """Size of all rows in memory."""
        return len(self) * sum(int(np.prod(s)) * np.dtype(t).itemsize for s, t in self._columns.values())


def fits_in_memory(nbytes: int, cache_gb: float) -> bool:
    """Whether a table of `nbytes` is kept in memory: it takes at most `cache_gb` and a quarter of the machine."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return nbytes <= min(cache_gb * 1e9, installed / 4)


def read_manifest(root: pathlib.Path) -> Manifest | None:
    """The manifest of the finished records in `root`; None where there are none.

    Raises: ConfigError when a shard has not the size that the manifest says.
    """
    path = root / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    for shards in manifest["shards"].values():
        for shard in shards:
            file = root / manifest["folder"] / shard["file"]
            size = file.stat().st_size if file.exists() else 0
            if size != shard["bytes"]:
                raise ConfigError(
                    f"{file}: {size:,} bytes are left of the {shard['bytes']:,} written; "
                    f"delete {root} and make it again"
                )
    return manifest


def check_settings(root: pathlib.Path, manifest: Manifest, settings: Mapping[str, Any]) -> None:
    """ConfigError naming the first of `settings` in which the records in `root` differ."""
    for name, value in json.loads(json.dumps(settings)).items():
        if manifest["settings"].get(name) != value:
            raise ConfigError(
                f"{root}: its {name} is {manifest['settings'].get(name)!r}, wanted is {value!r}; "
                "delete it to have it made again, or name another folder"
            )
