"""Configs on disk, and whose a workdir is."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from jaxdiff.config.fields import number_or_several
from jaxdiff.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SAMPLE_FIELDS = ("sample",)  # groups that --mode=sample may change
# Groups and fields that a resumed run may change as well: they bear on what is recorded, not on what is learnt, or on
# the memory that it takes.
FREE_DATA_FIELDS = ("path", "prepared", "max_rejected", "threads", "workers", "cache_gb")
FREE_FIELDS = (
    *SAMPLE_FIELDS,
    "eval",
    "autoencoder.latents",
    "autoencoder.scores",
    "model.attention_chunk",
    "model.remat",
    *(f"data.{field}" for field in FREE_DATA_FIELDS),
)
EVALUATE_FIELDS = (
    "sample",
    "eval",
    *(f"data.{field}" for field in FREE_DATA_FIELDS),
)  # what --mode=evaluate may change
# Fields that are younger than some workdirs, and what those were made with.
ADDED_FIELDS = {
    "adam_betas": (0.9, 0.999),
    "autoencoder.train.adam_betas": (0.9, 0.999),
    "ema_decays": (),
    "ema_sigma_rel": (),
    "ema_snapshot_every": 0,
    "autoencoder.train.ema_decays": (),
    "autoencoder.train.ema_sigma_rel": (),
    "autoencoder.train.ema_snapshot_every": 0,
    "data.name": "",
    "data.classes": "",
    "autoencoder.norm_groups": 32,
    "autoencoder.attention_levels": (),
    "autoencoder.perceptual_weight": 0.0,
    "autoencoder.lpips": "",
    "autoencoder.disc_weight": 0.0,
    "autoencoder.disc_start": 0.25,
    "autoencoder.disc_layers": 3,
    "autoencoder.scores": (),
    "model.name": "unet",
    "model.num_heads": 0,
    "model.mid_attention": True,
    "model.conditional": True,
    "model.null_class": True,
    "model.learned_variance": False,
    "model.scale_shift_norm": True,
    "model.resblock_updown": True,
    "model.downsample_padding": 1,
    "model.norm_groups": 32,
    "model.norm_eps": 1e-5,
    "model.freq_shift": 0.0,
    "model.cross_resolution": (),
    "model.qk_norm": False,
    "model.attention_chunk": 0,
    "model.remat": "none",
    "diffusion.scaling_factor": 0.0,
    "diffusion.noise_shift": 1.0,
    "diffusion.zero_terminal_snr": False,
    "diffusion.prediction": "eps",
    "diffusion.sigma_data": 0.5,
    "diffusion.loss": "mse",
    "diffusion.weighting": "simple",
    "diffusion.weighting_gamma": 0.0,
    "diffusion.time_sampling": "uniform",
    "diffusion.time_normal": (),
    "diffusion.stratified": False,
    "sample.sigmas": (0.002, 80.0, 7.0),
    "sample.churn": (),
    "eval.nll": False,
    "eval.nll_num": 0,
    "sample.guidance_interval": (),
    "sample.guidance_rescale": 0.0,
    "sample.autoguidance": "",
    "sample.autoguidance_step": 0,
    "sample.decode_batch": 0,
    "sample.decode_tile": 0,
    "eval.num": 0,
    "eval.images": "",
    "eval.steps": (),
    "eval.extractor": "effnet_lite0",
    "eval.inception": "",
    "eval.resize": "pytorch",
    "eval.reference": "val",
    "eval.splits": 10,
    "eval.k": 3,
    "eval.neighbours": 0,
    "eval.every": 0,
    "eval.every_num": 100,
}
STARTS = "starts.jsonl"
WORKDIR = "{workdir}"  # in autoencoder.path: the run's own, wherever that is moved to
FREE_RECIPE_FIELDS = ("log_every", "sample_every", "checkpoint_every", "keep")


def cache_root() -> pathlib.Path:
    """The folder of what can be computed again, $XDG_CACHE_HOME/jaxdiff or ~/.cache/jaxdiff."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxdiff"


def may_change(field: str) -> bool:
    """Whether a run may be resumed with another value of the field "a.b"."""
    group, recipe_field = field.split(".")[0], field.removeprefix("autoencoder.train.")
    return field in FREE_FIELDS or group in FREE_FIELDS or recipe_field in FREE_RECIPE_FIELDS


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made, among this machine's processes; waits for it."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file to write, which takes the place of `path` at the end: a reader sees the old one or the whole new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON, as `replacing`."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def training_in(config: ConfigDict, workdir: pathlib.Path) -> Iterator[None]:
    """Make `workdir` this config's, as `claim_workdir`, and be alone of this machine's processes in training there.

    Raises: ConfigError as that, or where another process is training there, whose config is left as it is.
    """
    check_workdir(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    handle = os.open(workdir / STARTS, os.O_RDONLY | os.O_CREAT, 0o644)  # which is never replaced
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigError(f"--workdir={workdir}: another process is training there") from None
        claim_workdir(config, workdir)
        yield
    finally:
        os.close(handle)


def read_json(path: pathlib.Path) -> Any:
    """What `write_json` wrote. Raises: ConfigError where the file is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not UTF-8
        raise ConfigError(f"{path}: is damaged ({error}); put it in order, or elsewhere") from None


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a file with one to a line; what is none, such as a torn last line, is passed over."""
    records = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def save(config: ConfigDict, path: pathlib.Path) -> None:
    """Write a config as JSON."""
    write_json(path, config.to_dict())


def load(path: pathlib.Path) -> ConfigDict:
    """Read what `save` wrote, in this version or an earlier one."""
    content = read_json(path)
    if not isinstance(content, dict) or not {"name", "experiment"} <= set(content):
        raise ConfigError(f"{path}: is not a config of jaxdiff; give the workdir of a training run")
    config = ConfigDict(_tuples(content))
    recipes = [config.get(name, {}) for name in ("ddpm", "ldm")] if config.get("experiment") == "ladder" else [config]
    for name, value in ADDED_FIELDS.items():
        *parts, field = name.split(".")
        for recipe in [config] if parts[:1] in (["data"], ["eval"]) else recipes:  # which a ladder has once
            group: Any = recipe
            for part in parts:
                group = group.get(part, {})
            if group and field not in group:
                group[field] = value
    if "sample" in config:
        config.sample.guidance = number_or_several(config.sample.guidance)
    return config


def _tuples(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _tuples(v) for k, v in tree.items()}
    return tuple(_tuples(v) for v in tree) if isinstance(tree, list) else tree


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of a nested config."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, ConfigDict)
        flat |= flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def autoencoder_folder(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Workdir of the autoencoder of the run in `workdir`: the one that is given, or that of the first stage."""
    path = config.autoencoder.path.replace(WORKDIR, str(workdir))
    return pathlib.Path(os.path.normpath(path)) if path else workdir / "autoencoder"


def seen_from(config: ConfigDict, workdir: pathlib.Path) -> str:
    """`autoencoder_folder` as a checkpoint names it: from `workdir` where it moves with it, else absolute."""
    folder = autoencoder_folder(config, workdir)
    moves = WORKDIR in config.autoencoder.path or not config.autoencoder.path
    return os.path.relpath(folder, workdir) if moves else str(folder.resolve())


def check_workdir(config: ConfigDict, workdir: pathlib.Path, may_change: Callable[[str], bool] = may_change) -> None:
    """ConfigError when `workdir` was made with another config (but for what `may_change`) or is not one."""
    path = workdir / "config.json"
    if path.exists():
        before = load(path)
        old, new = flatten(before), flatten(config)
        if old.get("autoencoder.path") and new.get("autoencoder.path"):  # one folder may be written in several ways
            folders = [autoencoder_folder(whose, workdir).resolve() for whose in (before, config)]
            if folders[0] == folders[1]:
                old["autoencoder.path"] = new["autoencoder.path"]
        # What other fields follow from comes first.
        for field in sorted({*old, *new}, key=lambda name: (name != "experiment", not name.startswith("data."), name)):
            if not may_change(field) and old.get(field) != new.get(field):
                raise ConfigError(
                    f"config.{field} = {new.get(field)!r}: {workdir} was made with {old.get(field)!r}; "
                    "use that, or give another --workdir"
                )
    elif workdir.exists() and not (workdir.is_dir() and all(path.name == STARTS for path in workdir.iterdir())):
        raise ConfigError(f"--workdir={workdir}: exists and is not a jaxdiff workdir; give another")


def claim_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Make `workdir` this config's, whose newest values it then holds; errors as `check_workdir`."""
    check_workdir(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    save(config, workdir / "config.json")
