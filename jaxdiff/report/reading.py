"""What the files of a workdir say; any of them may be missing, torn, or older than this version."""

import json
import math
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxdiff.config import files
from jaxdiff.config.files import read_jsonl
from jaxdiff.errors import ConfigError
from jaxdiff.ladder.rungs import rung_config, rung_names

STAGES = ("autoencoder", "diffusion")
TRAINING_PICTURE = re.compile(r"(autoencoder|diffusion)-(\d+)-raw-ema(?:-\d+)?\.png")


class Run(NamedTuple):
    """One workdir. `owner` is the name of the run whose autoencoder it is, or its own."""

    name: str
    owner: str
    workdir: pathlib.Path
    config: ConfigDict
    meta: dict[str, Any]  # of the newest checkpoint
    lines: list[dict[str, Any]]  # metrics.jsonl
    validation: dict[str, Any]
    records: list[dict[str, Any]]
    starts: list[dict[str, Any]]

    @property
    def stage(self) -> str:
        """The stage that this workdir is there for."""
        return "autoencoder" if self.config.experiment == "vae" else "diffusion"

    @property
    def steps(self) -> tuple[int, int | None]:
        """Steps done, and all steps where they are known: epochs need a checkpoint, which counts the images."""
        config, images = self.config, number(mapping(self.meta.get("data")).get("images"))
        done = max((line["step"] for line in self.lines if line.get("stage", self.stage) == self.stage), default=0)
        if config.get("steps"):
            return done, config.steps
        return done, images and max(1, round(config.epochs * images / config.batch_size))

    def numbers(self, name: str) -> list[float]:
        """All finite values of a number of this run's stage, in the order of steps."""
        own = [line.get(name) for line in self.lines if line.get("stage", self.stage) == self.stage]
        return [value for value in map(number, own) if value is not None]

    @property
    def own(self) -> bool:
        """Whether this is a run that was asked for, and not the autoencoder of one."""
        return self.name == self.owner


def number(value: Any) -> Any:
    """`value` if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def mapping(value: Any) -> dict[str, Any]:
    """`value` if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def read_json(path: pathlib.Path) -> Any:
    """What a JSON file holds, None where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_arrays(path: pathlib.Path, *names: str) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz, None where the file is missing or damaged or lacks one of `names`; never a pickle."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
    return arrays if all(name in arrays for name in names) else None


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have a step, in the order of steps."""
    return sorted((r for r in read_jsonl(path) if isinstance(number(r.get("step")), int)), key=lambda r: r["step"])


def read_scores(path: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Validation scores and records of scores.json; an old one, {name: value}, holds validation scores only."""
    scores = mapping(read_json(path))
    if not any(isinstance(scores.get(key), kind) for key, kind in (("validation", dict), ("records", list))):
        return {name: value for name, value in scores.items() if not isinstance(value, dict | list)}, []
    records = [record for record in scores.get("records") or [] if mapping(mapping(record).get("scores"))]
    groups = ("scores", "floor", "protocol", "seconds", "pictures")
    return mapping(scores.get("validation")), [{**r, **{g: mapping(r.get(g)) for g in groups}} for r in records]


def newest_meta(workdir: pathlib.Path) -> dict[str, Any]:
    """The meta of the newest checkpoint that has one: class names, the autoencoder's folder, the number of images."""
    steps = sorted((int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdecimal()), reverse=True)
    found = (mapping(read_json(workdir / "checkpoints" / str(step) / "meta" / "metadata")) for step in steps)
    return next(filter(None, found), {})


def read_run(workdir: pathlib.Path, name: str, owner: str | None = None) -> Run:
    """One workdir.

    Raises: ConfigError when it has no config.json that can be read.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ConfigError(f"--workdir={workdir}: no config.json there; give the workdir of a training run")
    try:
        config = files.load(path)
        _ = config.experiment, config.data, config.batch_size
    except (OSError, ValueError, TypeError, AttributeError):
        raise ConfigError(f"--workdir={workdir}: its config.json is damaged, or no config of jaxdiff") from None
    metrics, starts = read_metrics(workdir / "metrics.jsonl"), read_jsonl(workdir / "starts.jsonl")
    validation, records = read_scores(workdir / "scores.json")
    return Run(name, owner or name, workdir, config, newest_meta(workdir), metrics, validation, records, starts)


def short_names(workdirs: Sequence[pathlib.Path]) -> list[str]:
    """A name for each of several different folders: as many of its last parts as tell it from the others."""
    parts = [path.resolve().parts for path in workdirs]
    for k in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-k:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def read_runs(workdirs: Sequence[pathlib.Path]) -> list[Run]:
    """The runs of `workdirs`, each once and in this order, and after each its autoencoder, if not among them.

    The workdir of a ladder stands for those of its rungs.

    Raises: ConfigError where one has no config.json, or where there is none at all.
    """
    rungs = [rung for workdir in workdirs for rung in _rungs(workdir)]
    distinct = list({path.resolve(): path for path in rungs}.values())
    if not distinct:
        raise ConfigError("--workdir: none given; give the workdir of a training run")
    runs, seen = [], {path.resolve() for path in distinct}
    for workdir, name in zip(distinct, short_names(distinct), strict=True):
        runs.append(read_run(workdir, name))
        for folder in _autoencoders(runs[-1]):
            inner = folder.resolve().is_relative_to(workdir.resolve())
            if folder.resolve() not in seen and (folder / "config.json").exists():
                seen.add(folder.resolve())
                runs.append(read_run(folder, f"{name}/{folder.name}" if inner else f"{folder.name} of {name}", name))
                break
            if folder.resolve() in seen:
                break
    return runs


def _rungs(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The workdirs of a ladder that there are, or the one that it is itself where it is none."""
    if (config := ladder_config(workdir)) is None:
        return [workdir]
    if found := [workdir / name for name in rung_names(config) if (workdir / name / "config.json").exists()]:
        return found
    raise ConfigError(f"--workdir={workdir}: no training of this ladder has begun yet; give another, or wait")


def ladder_config(workdir: pathlib.Path) -> ConfigDict | None:
    """The config of a ladder's workdir; None where it is none, or damaged, or its trainings can no longer be told."""
    try:
        config = files.load(workdir / "config.json")
        if config.experiment != "ladder":
            return None
        for name in rung_names(config):
            rung_config(config, name)
        return config
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


class Ladder(NamedTuple):
    """A ladder's workdir, and the runs of its rungs by name."""

    workdir: pathlib.Path
    config: ConfigDict
    rungs: dict[str, Any]  # ladder.json
    starts: list[dict[str, Any]]
    runs: dict[str, Run]


def read_ladders(runs: Sequence[Run]) -> list[Ladder]:
    """The ladders of which `runs` are all the rungs that there are so far."""
    found = []
    for folder in dict.fromkeys(run.workdir.absolute().parent for run in runs if run.own):
        if (config := ladder_config(folder)) is None:
            continue
        here = {run.workdir.absolute().name: run for run in runs if run.workdir.absolute().parent == folder}
        begun = [name for name in rung_names(config) if (folder / name / "config.json").exists()]
        if begun and all(name in here for name in begun):
            rungs = mapping(mapping(read_json(folder / "ladder.json")).get("rungs"))
            starts = read_jsonl(folder / "starts.jsonl")
            found.append(Ladder(folder, config, rungs, starts, {name: here[name] for name in begun}))
    return found


def _autoencoders(run: Run) -> Iterator[pathlib.Path]:
    if run.config.experiment == "ldm":
        if isinstance(run.meta.get("autoencoder"), str):
            yield run.workdir / run.meta["autoencoder"]
        if run.config.autoencoder.get("path"):
            yield files.autoencoder_folder(run.config, run.workdir)
        yield run.workdir / "autoencoder"


def training_pictures(run: Run) -> dict[str, dict[int, pathlib.Path]]:
    """{stage: {step: path}} of the grids drawn during training, in the order of steps."""
    found: dict[str, dict[int, pathlib.Path]] = {}
    for path in sorted((run.workdir / "samples").glob("*-raw-ema*.png")):
        if match := TRAINING_PICTURE.fullmatch(path.name):
            found.setdefault(match[1], {})[int(match[2])] = path  # a numbered one, made later, replaces the first
    return {stage: dict(sorted(found[stage].items())) for stage in STAGES if stage in found}


def class_names(run: Run) -> list[str]:
    """Names of the classes, of the checkpoint or of real.npz; none where neither tells."""
    names = run.meta.get("class_names")
    if not isinstance(names, list):
        arrays = read_arrays(run.workdir / "samples" / "real.npz", "class_names") or {"class_names": np.array([])}
        names = arrays["class_names"].tolist()
    return [str(name) for name in names]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested mappings."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out
