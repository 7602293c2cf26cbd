"""starts.jsonl: what is recorded of a start, with git and without."""

import json
import os
import re
import subprocess

import jax
import numpy
import pytest

from jaxdiff import mesh as meshes
from jaxdiff.training import environment
from jaxdiff.training.environment import command, git_commit, record_compilation, record_start


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["/a/jaxdiff/main.py", "--workdir=my run"], "python -m jaxdiff.main '--workdir=my run'"),
        (["train.py", "--seed", "3"], "python train.py --seed 3"),
    ],
)
def test_command_is_what_a_user_types(argv, line):
    assert command(argv) == line


def test_lines_are_added(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", (*environment.PACKAGES, "no-such-package"))
    monkeypatch.setattr(environment, "git_commit", lambda root: None)
    for seconds in (1.26, 3.0):
        record_start(tmp_path, meshes.make_mesh())
        record_compilation(tmp_path, "diffusion", seconds)
    lines = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [line.get("compile_seconds") for line in lines] == [None, 1.3, None, 3.0]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", line["time"]) for line in lines)
    start = lines[0]
    assert {name: start[name] for name in ("device", "processes", "mode")} == {
        "device": "8 x cpu",
        "processes": 1,
        "mode": "train",
    }
    assert start["packages"].keys() == {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert start["packages"]["jax"] == jax.__version__ and start["packages"]["numpy"] == numpy.__version__
    assert "git" not in start


def test_commit_of_a_checkout_and_of_nothing_else(tmp_path, monkeypatch):
    """An installed jaxdiff lies in a folder that may be in somebody's repository, but is not of it."""
    settings = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    names = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments):
        call = subprocess.run(["git", *arguments], cwd=tmp_path, env=plain | settings | names, capture_output=True)
        assert call.returncode == 0, call.stderr
        return call.stdout.decode().strip()

    package = tmp_path / "jaxdiff" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    assert git_commit(tmp_path) is None
    git("init")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "-m", "other")
    assert git_commit(tmp_path) is None
    git("add", ".")
    git("commit", "-m", "one")
    git("tag", "-a", "v1", "-m", "v1")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as in a hook of another repository
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    package.write_text("changed = True")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD") + "+changes"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path) is None
