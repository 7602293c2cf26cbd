"""Writing ArrayRecord shards through a TFDS builder: in parallel, in order, each shard whole or not at all."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tqdm import tqdm

from jaxdiff.config.files import alone, write_json
from jaxdiff.data.records import MANIFEST, Manifest, check_settings, read_manifest
from jaxdiff.errors import ConfigError

Note = dict[str, Any]
SHARD_BYTES = 128 << 20  # at most, as TFDS advises
MIN_SHARD_ROWS = 64


class Shard(NamedTuple):
    """Part of a split: candidates for rows, by number."""

    split: str
    number: int
    candidates: range


class Plan(NamedTuple):
    """What is to be written.

    splits: name -> number of candidates. settings: JSON values that identify the content. row_bytes: size of a row.
    generate(shard, note): the rows of a shard, in order; it may leave candidates out, and put JSON values into `note`.
    finish(notes): fields for the manifest from the notes of all shards; what it raises leaves no data set.
    """

    features: tfds.features.FeaturesDict
    splits: Mapping[str, int]
    settings: Mapping[str, Any]
    row_bytes: int
    generate: Callable[[Shard, Note], Iterator[Mapping[str, Any]]]
    finish: Callable[[Sequence[Note]], Mapping[str, Any]]

    def shards(self) -> list[Shard]:
        """All shards; the layout depends on the plan alone."""
        out = []
        for split, count in self.splits.items():
            rows = min(max(MIN_SHARD_ROWS, SHARD_BYTES // self.row_bytes), max(MIN_SHARD_ROWS, -(-count // 32)))
            rows += rows % 2  # latents have two rows an image, which stay together
            starts = enumerate(range(0, count, rows))
            out += [Shard(split, i, range(first, min(first + rows, count))) for i, first in starts]
        return out


def write_records(root: pathlib.Path, plan: Plan, *, threads: int, what: str) -> Manifest:
    """Write a plan's rows to `root`, a TFDS data set in ArrayRecord format, and its manifest last of all.

    An interrupted call leaves no manifest, and shards that the next call with the same plan need not write again.
    Where the records are there already nothing is written; where another process writes them it is waited for. A
    progress bar begins with `what`.
    Raises: ConfigError when `root` holds records of other settings or something else, or cannot be written.
    """
    with locked(root):
        return write_locked(root, plan, threads=threads, what=what)


@contextlib.contextmanager
def locked(root: pathlib.Path) -> Iterator[None]:
    """As `files.alone`. Raises: ConfigError where it cannot be written."""
    try:
        with alone(root):
            yield
    except OSError as error:
        raise _unwritable(root, error) from error


def _unwritable(root: pathlib.Path, error: Exception) -> ConfigError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ConfigError(f"{root}: cannot be written ({reason}); started again, it goes on from there")


def write_locked(root: pathlib.Path, plan: Plan, *, threads: int, what: str) -> Manifest:
    """As `write_records`, within `locked`."""
    manifest = read_manifest(root)  # that of another process, too, which was waited for
    if manifest is not None:
        check_settings(root, manifest, plan.settings)
        return manifest
    try:
        partial = _open_partial(root, plan)
        # In a file the bar is a line now and then.
        interval = 0.2 if sys.stderr.isatty() else 10
        total = sum(plan.splits.values())
        with tqdm(total=total, unit="img", desc=f"{what} {root}", smoothing=0.05, mininterval=interval) as bar:
            builder = Records(root, plan, partial, threads, bar.update)
            shutil.rmtree(builder.data_dir, ignore_errors=True)  # left by a call that died before the last line below
            builder.download_and_prepare(download_dir=str(partial / "downloads"))
        write_json(root / MANIFEST, builder.manifest)
    except (OSError, RuntimeError) as error:  # ArrayRecord's writer raises the latter
        raise _unwritable(root, error) from error
    shutil.rmtree(partial)
    return builder.manifest


def _begun(root: pathlib.Path) -> bool:
    """Whether the folder holds what an earlier call left: its plan, or the folder for it."""
    partial = root / "partial"
    names = {path.name for path in partial.iterdir()} if partial.is_dir() else None
    return names is not None and ("plan.json" in names or all(name.startswith("plan.json.") for name in names))


def pending_shards(root: pathlib.Path, plan: Plan) -> list[Shard]:
    """The shards that `write_locked` would write, within `locked`."""
    if (root / MANIFEST).exists():
        return []
    partial = _open_partial(root, plan)
    return [shard for shard in plan.shards() if not _note_path(partial, shard).exists()]


def _open_partial(root: pathlib.Path, plan: Plan) -> pathlib.Path:
    """The folder of finished shards, emptied where they are of another plan; ConfigError where `root` is not ours."""
    if any(root.iterdir()) and not _begun(root):
        raise ConfigError(f"{root}: exists and holds something else; name another folder")
    partial = root / "partial"
    wanted = json.loads(json.dumps({"settings": plan.settings, "splits": plan.splits}))
    path = partial / "plan.json"
    if partial.exists() and not (path.exists() and json.loads(path.read_text()) == wanted):
        shutil.rmtree(partial)
    if not partial.exists():
        partial.mkdir(parents=True)
        write_json(path, wanted)
    return partial


def _note_path(partial: pathlib.Path, shard: Shard) -> pathlib.Path:
    return partial / f"{shard.split}-{shard.number:05d}.json"


class Records(tfds.core.GeneratorBasedBuilder):
    """Rows of a plan."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self, root: pathlib.Path, plan: Plan, partial: pathlib.Path, threads: int, progress: Callable[[int], Any]
    ) -> None:
        self._plan, self._partial, self._threads, self._progress = plan, partial, threads, progress
        self._stop = threading.Event()
        self.manifest: dict[str, Any] = {}
        super().__init__(data_dir=str(root), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=self._plan.features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, list[Shard]]:
        return {split: [s for s in self._plan.shards() if s.split == split] for split in self._plan.splits}

    def _generate_examples(self, shard: Shard, note: Note) -> Iterator[tuple[int, Mapping[str, Any]]]:
        yield from enumerate(self._plan.generate(shard, note))

    def _log_download_bytes(self) -> None:
        """Nothing: there is a progress bar."""

    def _log_download_done(self) -> None:
        """Nothing: what follows says where the records are."""

    def _generate_splits(self, dl_manager: Any, download_config: Any) -> list[tfds.core.SplitInfo]:
        # In place of TFDS's: that one writes in one thread, cannot go on where it was interrupted, and above 1 GB sorts
        # the rows in files that it opens with TensorFlow. Here every shard is a file that is finished on its own.
        splits = self._split_generators(dl_manager)
        tasks = [shard for shards in splits.values() for shard in shards]
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            futures = [pool.submit(self._write_shard, shard) for shard in tasks]
            try:
                done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
                notes = [future.result() for future in futures if future in done]  # raises what one of them raised
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        fields = self._plan.finish(notes)
        infos: list[tfds.core.SplitInfo] = []
        table: dict[str, list[dict[str, Any]]] = {}
        for split, shards in splits.items():
            kept = [(shard, note) for shard, note in zip(tasks, notes, strict=True) if shard in shards and note["rows"]]
            if not kept:
                continue
            template = self._get_filename_template(split_name=split)
            table[split] = []
            for index, (shard, note) in enumerate(kept):
                path = pathlib.Path(template.sharded_filepath(shard_index=index, num_shards=len(kept)))
                _link(self._data_file(shard), path)
                table[split].append({"file": path.name, **{k: note[k] for k in ("rows", "bytes", "sha256")}})
            lengths, size = [s["rows"] for s in table[split]], sum(s["bytes"] for s in table[split])
            infos.append(
                tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)
            )
        content = json.dumps([[split, [s["sha256"] for s in shards]] for split, shards in table.items()])
        self.manifest = {
            "settings": dict(self._plan.settings),
            "checksum": hashlib.sha256(content.encode()).hexdigest(),
            "folder": f"{self.name}/{self.version}",
            **fields,
            "shards": table,
        }
        return infos

    def _data_file(self, shard: Shard) -> pathlib.Path:
        return _note_path(self._partial, shard).with_suffix(".array_record")

    def _write_shard(self, shard: Shard) -> Note:
        note_path, path = _note_path(self._partial, shard), self._data_file(shard)
        if note_path.exists():  # finished by an earlier call
            self._progress(len(shard.candidates))
            return json.loads(note_path.read_text())
        note: Note = {}
        features = self._plan.features
        serializer = ExampleSerializer(features.get_serialized_info())
        unfinished = path.with_suffix(".unfinished")
        # One row a chunk for random access; rows are noise to a compressor, which would only cost time.
        writer = ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
        rows = 0
        try:
            for _, row in self._generate_examples(shard, note):
                if self._stop.is_set():
                    break
                writer.write(serializer.serialize_example(features.encode_example(row)))
                rows += 1
                self._progress(1)
        finally:
            writer.close()
        if self._stop.is_set():  # another shard failed, and what this one wrote is not all
            return note
        self._progress(len(shard.candidates) - rows)
        with unfinished.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        note |= {"rows": rows, "bytes": unfinished.stat().st_size, "sha256": digest}
        unfinished.replace(path)
        write_json(note_path, note)
        return note


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
