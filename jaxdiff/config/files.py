"""Configs on disk, and whose a workdir is."""

import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from jaxdiff.errors import ConfigError

# Fields that --mode=sample may change in a trained run, and that may differ when it is resumed.
FREE_FIELDS = ("sample",)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def save(config: ConfigDict, path: pathlib.Path) -> None:
    """Write a config as JSON."""
    write_json(path, config.to_dict())


def load(path: pathlib.Path) -> ConfigDict:
    """Read what `save` wrote."""
    return ConfigDict(_tuples(json.loads(path.read_text())))


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


def check_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
    """ConfigError when `workdir` was made with another config (the fields `sample` may differ) or is not one."""
    path = workdir / "config.json"
    if path.exists():
        old, new = flatten(load(path)), flatten(config)
        for field in sorted({*old, *new}):
            if field.split(".")[0] not in FREE_FIELDS and old.get(field) != new.get(field):
                raise ConfigError(
                    f"config.{field} = {new.get(field)!r}: {workdir} was made with {old.get(field)!r}; "
                    "use that, or give another --workdir"
                )
    elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError(f"--workdir={workdir}: exists and is not a jaxdiff workdir; give another")


def claim_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Make `workdir` this config's, unless it already is; errors as `check_workdir`."""
    check_workdir(config, workdir)
    if not (workdir / "config.json").exists():
        workdir.mkdir(parents=True, exist_ok=True)
        save(config, workdir / "config.json")
