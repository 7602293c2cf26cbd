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

from jaxdiff.errors import Stopped
from jaxdiff.training.stages import run_train
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 120


def get_config():
    """Read by the processes as well: this file is their --config."""
    config = tiny_config("ldm")
    config.model.update(channel_mult=(1,), attention_resolutions=())
    config.update(steps=STEPS, log_every=1, checkpoint_every=10**6)
    config.eval.scores = ()
    return config


def start(cwd):
    """Two processes of one run, with a device each; their output goes to log-0 and log-1."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = []
    for index in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "",  # a device each
            "JAXDIFF_COORDINATOR": f"localhost:{port}",
            "JAXDIFF_NUM_PROCESSES": "2",
            "JAXDIFF_PROCESS_ID": str(index),
        }
        command = [sys.executable, "-m", "jaxdiff.main", f"--config={__file__}", "--workdir=run"]
        log = (cwd / f"log-{index}").open("w")
        running.append(subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return running


def logs(cwd):
    return [(cwd / f"log-{index}").read_text() for index in range(2)]


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_two_processes_train_stop_together_and_go_on_as_one_would(tmp_path):
    # A signal to one of them stops both after the same step.
    running = start(tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not metrics.exists() or metrics.read_text().count("\n") < 6:
        assert all(process.poll() is None for process in running), logs(tmp_path)
        assert time.monotonic() < deadline, logs(tmp_path)
        time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)
    for process in running:
        assert process.wait(120) == 128 + signal.SIGTERM, logs(tmp_path)
    said = {line for log in logs(tmp_path) for line in log.splitlines() if line.startswith("stopped and saved at step")}
    assert len(said) == 1
    step = int(said.pop().split()[5])
    assert 5 < step < STEPS
    assert [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()] == [step]

    for process in start(tmp_path):
        assert process.wait(300) == 0, logs(tmp_path)
    first, second = logs(tmp_path)
    assert f"going on from step {step} of {STEPS}" in first and "sample grid" in first
    assert "loss" not in second and "sample" not in second  # one process alone talks
    assert len(list((tmp_path / "run").glob("autoencoder/latents/*/manifest.json"))) == 1
    assert (tmp_path / "run" / "samples" / "final.npz").exists()
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert [(line.get("device"), line.get("processes")) for line in starts] == [("2 x cpu", 2), (None, None)] * 2
    two = losses(tmp_path / "run")
    assert list(two) == list(range(1, STEPS + 1))

    # The losses are those of one process with eight devices.
    with pytest.raises(Stopped):
        run_train(get_config(), tmp_path / "alone", stop_at=6)
    alone = losses(tmp_path / "alone")
    assert len(alone) == 6
    assert {step: two[step] for step in alone} == pytest.approx(alone, rel=1e-3)
