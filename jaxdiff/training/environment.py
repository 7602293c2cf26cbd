"""starts.jsonl: with what command, versions and devices a run was started, each time that it was."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

import jax
from jax.sharding import Mesh

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def record_start(workdir: pathlib.Path, mesh: Mesh, mode: str = "train") -> None:
    """Add a line to `workdir`/starts.jsonl for a training (or `mode`) that starts: command, versions, commit."""
    record = {
        "command": command(sys.argv),
        "mode": mode,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
        "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "processes": jax.process_count(),
    }
    if commit := git_commit(ROOT):
        record["git"] = commit
    _append(workdir, record)


def record_compilation(workdir: pathlib.Path, stage: str, seconds: float) -> None:
    """Add a line for the compilation of a stage's step, which belongs to the start above it."""
    _append(workdir, {"stage": stage, "compile_seconds": round(seconds, 1)})


def installed(package: str) -> str | None:
    """Version of a package; None where it is not installed under that name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def command(argv: list[str]) -> str:
    """What a user would type for sys.argv."""
    script, *arguments = argv
    module = pathlib.Path(script).parts[-2:] == ("jaxdiff", "main.py")
    return shlex.join(["python", *(["-m", "jaxdiff.main"] if module else [script]), *arguments])


def git_commit(root: pathlib.Path) -> str | None:
    """Commit that the jaxdiff in `root` is of, with "+changes" where its tracked files differ; None if it has none.

    An installed jaxdiff is not in git, though the folder that it is installed in may be.
    """
    # Of another repository would be what a git hook sets; the index is left as it is.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"

    def git(*arguments: str) -> str:
        words = ["git", "-C", str(root), *arguments]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "jaxdiff/__init__.py")
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes")
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or one that answers too late
        return None


def _append(workdir: pathlib.Path, record: dict[str, Any]) -> None:
    record = {"time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), **record}
    with (workdir / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
