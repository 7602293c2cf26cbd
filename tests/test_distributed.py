"""Two processes, found through the variables that launch.sh documents, train as one does."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TINY = """
from tests.conftest import tiny_config

def get_config(steps):
    config = tiny_config("ddpm")
    config.model.update(channel_mult=(1,), attention_resolutions=())
    config.update(steps=int(steps), log_every=1, checkpoint_every=10**6)
    config.eval.scores = ()
    return config
"""


def start(cwd, steps, processes, devices, workdir):
    """The processes of one run, with `devices` devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = []
    for index in range(processes):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        if processes > 1:
            environment |= {
                "JAXDIFF_COORDINATOR": f"localhost:{port}",
                "JAXDIFF_NUM_PROCESSES": str(processes),
                "JAXDIFF_PROCESS_ID": str(index),
            }
        command = [sys.executable, "-m", "jaxdiff.main", f"--config=tiny.py:{steps}", f"--workdir={workdir}"]
        log = (cwd / f"{workdir}-{index}.log").open("w")
        running.append(subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return running


def logs(cwd, workdir):
    return "\n".join(path.read_text() for path in sorted(cwd.glob(f"{workdir}-*.log")))


def losses(cwd, workdir):
    lines = map(json.loads, (cwd / workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("distributed")
    (path / "tiny.py").write_text(TINY)
    return path


def test_two_processes_train_as_one(folder):
    for workdir, processes in (("two", 2), ("one", 1)):
        for process in start(folder, 6, processes, 2 // processes, workdir):
            assert process.wait(300) == 0, logs(folder, workdir)
    two, one = losses(folder, "two"), losses(folder, "one")
    assert list(two) == list(one) == [1, 2, 3, 4, 5, 6]
    assert two == pytest.approx(one, rel=1e-4)
    assert (folder / "two" / "samples" / "final.npz").exists()
    second = (folder / "two-1.log").read_text()
    assert "loss" not in second  # one process alone talks


def test_a_signal_to_one_stops_both_at_the_same_step(folder):
    running = start(folder, 100_000, 2, 1, "long")
    metrics = folder / "long" / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and metrics.read_text().count("\n") > 5:
            break
        assert all(process.poll() is None for process in running), logs(folder, "long")
        time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)
    for process in running:
        assert process.wait(120) == 128 + signal.SIGTERM, logs(folder, "long")
    said = {line for line in logs(folder, "long").splitlines() if line.startswith("stopped and saved at step")}
    assert len(said) == 1
    step = int(said.pop().split()[5].replace(",", ""))
    assert [int(p.name) for p in (folder / "long" / "checkpoints").iterdir()] == [step]
