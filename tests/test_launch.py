"""launch.sh, with a python3 and an nvidia-smi that only write down how they were called."""

import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "env", "mkdir", "mv", "rm", "rmdir", "sleep")

PYTHON = """#!/usr/bin/env bash
here=$(dirname "$0")
echo "$*" >>"$CALLS"
case "$1 ${2:-}" in
  "-c import sys"*) cat "$here/version" ;;
  "-c import ensurepip"*) exit "${FAKE_ENSUREPIP:-0}" ;;
  "-m venv")
    [[ $3 != --clear ]] || rm -r "${!#}"
    mkdir -p "${!#}/bin"; cp "$0" "${!#}/bin/python"; cp "$here/version" "${!#}/bin/version" ;;
  "-m pip")
    [[ $3 != --version ]] || exit 0
    [[ $* =~ \\[(cuda1.) ]] && mkdir -p "$here/../lib/python3/site-packages/jax_${BASH_REMATCH[1]}_plugin"
    sleep "${FAKE_PIP_SECONDS:-0}"
    exit "${FAKE_PIP:-0}" ;;
  *) echo "in $PWD" >>"$CALLS" ;;
esac
"""


class Sandbox:
    """A folder with launch.sh, and a PATH with the fakes and little else."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.repo, self.bin, self.calls = folder / "a repo", folder / "bin", folder / "calls"
        self.repo.mkdir()
        self.bin.mkdir()
        self.calls.touch()
        shutil.copy(ROOT / "launch.sh", self.repo)
        for name in ("pyproject.toml", "constraints.txt"):
            (self.repo / name).write_text(name)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found
            (self.bin / tool).symlink_to(found)
        self.fake("python3", PYTHON)
        (self.bin / "version").write_text("3.12\n")

    def fake(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def flock(self) -> None:
        if not (found := shutil.which("flock")):
            pytest.skip("no flock here")
        (self.bin / "flock").symlink_to(found)

    def nvidia_smi(self, header: str, code: int = 0) -> None:
        self.fake("nvidia-smi", f"#!/usr/bin/env bash\necho '{header}'\nexit {code}\n")

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.repo / "launch.sh"), *arguments],
            cwd=self.bin,
            env={"PATH": str(self.bin), "CALLS": str(self.calls), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """Standard error of launch.sh, which must exit with `code`."""
        process = self.start(*arguments, **environment)
        _, err = process.communicate(timeout=30)
        assert process.returncode == code, err
        return err

    def take_calls(self) -> list[str]:
        """How python was called since the last time, questions about itself left out."""
        calls = self.calls.read_text().splitlines()
        self.calls.write_text("")
        return [call for call in calls if not call.startswith(("-c ", "-m pip --version"))]

    def installed(self) -> list[str]:
        """What was installed since the last time, such as [".[cuda12,test]"]."""
        installs = [call for call in self.take_calls() if call.startswith("-m pip install")]
        return [call.split(" -e ")[1].replace(str(self.repo), ".") for call in installs]


@pytest.fixture
def box(tmp_path: pathlib.Path) -> Sandbox:
    return Sandbox(tmp_path)


# --- what is run


def test_quick_start_installs_and_trains_once_and_for_all(box: Sandbox) -> None:
    box.run()
    venv, install, main, where = box.take_calls()
    assert venv == f"-m venv {box.repo}/.venv"
    assert install.endswith(f"-c {box.repo}/constraints.txt -e {box.repo}")
    assert main == f"-m jaxdiff.main --config={box.repo}/configs/ldm_cfg.py"
    assert where == f"in {box.bin}", "the caller's folder, so that relative paths are as they were meant"
    box.run("--config=x.py", "--workdir=a b")
    assert box.take_calls() == ["-m jaxdiff.main --config=x.py --workdir=a b", f"in {box.bin}"]


def test_the_tests_run_in_the_repository(box: Sandbox) -> None:
    box.run("test", "-k", "launch")
    assert box.take_calls()[-2:] == ["-m pytest -k launch", f"in {box.repo}"]


def test_the_exit_status_is_that_of_python(box: Sandbox) -> None:
    box.run()
    box.fake("python3", "#!/usr/bin/env bash\nexit 7\n")
    shutil.copy(box.bin / "python3", box.repo / ".venv/bin/python")
    box.run(code=7)


# --- which JAX


@pytest.mark.parametrize(
    ("header", "code", "extra", "line"),
    [
        ("| NVIDIA-SMI 550.54  Driver Version: 550.54  CUDA Version: 12.4 |", 0, "[cuda12]", "cuda12"),
        ("| NVIDIA-SMI 580.65  Driver Version: 580.65  CUDA Version: 13.0 |", 0, "[cuda13]", "cuda13"),
        ("| Driver Version: 595.1   CUDA UMD Version: 13.2 |", 0, "[cuda13]", "cuda13"),
        ("| Driver Version: 535.183.01   CUDA Version: N/A |", 0, "[cuda12]", "cuda12"),
        ("| Driver Version: 470.1  CUDA Version: 11.4 |", 0, "", "cpu (the NVIDIA driver is too old"),
        ("no such line", 0, "", "cpu (nvidia-smi names no driver version"),
        ("NVIDIA-SMI has failed. CUDA Version: 12.4", 9, "", "cpu (nvidia-smi fails"),
    ],
)
def test_the_driver_decides(box: Sandbox, header: str, code: int, extra: str, line: str) -> None:
    box.nvidia_smi(header, code)
    assert f"JAX for {line}" in box.run().splitlines()[-1]
    assert box.installed() == ["." + extra]


def test_without_nvidia_smi_it_is_cpu(box: Sandbox) -> None:
    assert box.run().splitlines()[-1] == "launch.sh: JAX for cpu (no nvidia-smi)"
    assert box.installed() == ["."]


def test_the_variable_overrides_the_driver(box: Sandbox) -> None:
    box.nvidia_smi("CUDA Version: 12.4")
    assert "JAX for cuda13 (JAXDIFF_ACCELERATOR)" in box.run(JAXDIFF_ACCELERATOR="cuda13")
    assert box.installed() == [".[cuda13]"]


def test_a_second_cuda_build_does_not_join_the_first(box: Sandbox) -> None:
    box.run(JAXDIFF_ACCELERATOR="cpu")
    box.run(JAXDIFF_ACCELERATOR="cuda12", FAKE_PIP="1", code=1)
    box.run(JAXDIFF_ACCELERATOR="cuda12")
    assert not [call for call in box.take_calls() if "--clear" in call]
    box.run(JAXDIFF_ACCELERATOR="cuda13", FAKE_PIP="1", code=1)
    assert box.take_calls()[0] == f"-m venv --clear {box.repo}/.venv"
    box.run(JAXDIFF_ACCELERATOR="cpu")
    clear, install, *_ = box.take_calls()
    assert clear == f"-m venv --clear {box.repo}/.venv" and install.endswith(f"-e {box.repo}")


def test_hosts_with_and_without_gpu_share_a_folder(box: Sandbox) -> None:
    box.run()
    assert box.installed() == ["."]
    box.nvidia_smi("CUDA Version: 12.4")
    box.run()
    assert box.installed() == [".[cuda12]"]
    for header, code in (("", 1), ("CUDA Version: 13.0", 0)):
        box.nvidia_smi(header, code)
        assert "JAX for cuda12" in box.run()
        assert box.installed() == []


# --- when it installs


def test_an_interrupted_installation_is_taken_up(box: Sandbox) -> None:
    box.run(FAKE_PIP="1", code=1)
    assert box.take_calls()[-1].startswith("-m pip install"), "nothing is run after a failure"
    box.flock()
    process = box.start(FAKE_PIP_SECONDS="30")
    wait_until(lambda: "pip install" in box.calls.read_text())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    box.take_calls()
    box.run()
    assert box.installed() == ["."]
    box.run()
    assert box.installed() == []


def test_the_tests_need_their_extra_once_and_keep_the_accelerator(box: Sandbox) -> None:
    box.run(JAXDIFF_ACCELERATOR="cuda12")
    box.run("test", JAXDIFF_ACCELERATOR="cuda12")
    assert box.installed() == [".[cuda12]", ".[cuda12,test]"]
    for arguments in ([], ["test"]):
        box.run(*arguments)
        assert box.installed() == []
    (box.repo / "constraints.txt").write_text("numpy==2.5")
    box.run()
    assert box.installed() == [".[cuda12,test]"], "a plain start after a change keeps what was there"


def test_a_moved_folder_is_installed_anew(box: Sandbox) -> None:
    box.run()
    box.take_calls()
    box.repo = box.repo.rename(box.repo.with_name("moved"))
    box.run()
    assert box.take_calls()[0] == f"-m venv --clear {box.repo}/.venv", "scripts in it hold the old path"


def test_another_python_makes_another_environment(box: Sandbox) -> None:
    box.run(JAXDIFF_PYTHON="python3")
    (box.bin / "version").write_text("3.11\n")
    box.take_calls()
    box.run()
    assert box.installed() == [], "without the variable the environment stays"
    box.run(JAXDIFF_PYTHON="python3")
    assert box.take_calls()[0] == f"-m venv --clear {box.repo}/.venv"


@pytest.mark.parametrize("with_flock", [True, False])
def test_two_at_once_install_once(box: Sandbox, with_flock: bool) -> None:
    if with_flock:
        box.flock()
    first = box.start(FAKE_PIP_SECONDS="1")
    wait_until(lambda: "pip install" in box.calls.read_text())
    assert "waiting for another process" in box.run()
    first.communicate(timeout=30)
    calls = box.take_calls()
    assert sum("pip install" in call for call in calls) == 1
    assert sum("jaxdiff.main" in call for call in calls) == 2
    assert not (box.repo / ".venv.lock.d").exists()


def test_the_lock_is_not_held_while_training(box: Sandbox) -> None:
    box.flock()
    box.fake("python3", PYTHON.replace('echo "in', '[[ -e /proc/$$/fd/9 ]] && echo held; echo "in'))
    process = box.start()
    assert "held" not in process.communicate(timeout=30)[0]


# --- errors


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAXDIFF_ACCELERATOR": "tpu"}, "JAXDIFF_ACCELERATOR=tpu: must be cpu, cuda12 or cuda13"),
        ({"JAXDIFF_PYTHON": "python9"}, "python9 not found"),
        ({"FAKE_ENSUREPIP": "1"}, "apt install python3.12-venv"),
        ({"JAXDIFF_COORDINATOR": "a:1", "JAXDIFF_PROCESS_ID": "0"}, "not set: JAXDIFF_NUM_PROCESSES,"),
    ],
)
def test_errors_are_one_line(box: Sandbox, environment: dict[str, str], message: str) -> None:
    err = box.run(code=2, **environment)
    assert err.startswith("launch.sh: error: ") and err.count("\n") == 1
    assert message in err
    assert not box.take_calls()


@pytest.mark.parametrize("version", ["3.10", "3.14", "2.7"])
def test_other_pythons_are_refused(box: Sandbox, version: str) -> None:
    (box.bin / "version").write_text(version + "\n")
    assert f"python3 is Python {version}; JAXDIFF_PYTHON must name one of 3.11, 3.12, 3.13" in box.run(code=2)
    assert not box.take_calls()


def test_all_distributed_variables_are_passed_on(box: Sandbox) -> None:
    box.fake("python3", PYTHON.replace('echo "in', 'env | while read -r x; do echo "$x"; done; echo "in'))
    values = {"JAXDIFF_COORDINATOR": "a:1", "JAXDIFF_NUM_PROCESSES": "2", "JAXDIFF_PROCESS_ID": "1"}
    out, _ = box.start(**values).communicate(timeout=30)
    assert all(f"{name}={value}" in out.splitlines() for name, value in values.items())


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
