"""What real training keeps of the speed of its step: reading images, logging, validation and checkpoints included.

    python -m benchmarks.whole_system --dataset=cifar10 --set data.path=data/cifar10 --minutes=10
    python -m benchmarks.whole_system --experiment=ldm_cfg --dataset=folder --set data.path=data/imagenet100
    python -m benchmarks.whole_system --minutes=0.3 --set data.image_size=8    # a rehearsal on a CPU, with digits

First the step alone, on one batch that stays on the device; then training as --mode=train does it, for as many steps as
take `--minutes`. "steady" is the median of the log's images/s, which leave out validation, checkpoints and samples;
"by the clock" is all images from the first line of the log to the last but one, over the time between: the last line
comes after what is done once at the end. What pauses take is in a table of its own; the first of each compiles. Stages
before it (an autoencoder, its latents) are trained first in the workdir, and not measured.
"""

import argparse
import contextlib
import io
import json
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks.harness import device, environment, markdown
from benchmarks.techniques import set_fields
from configs import ablations
from jaxdiff import mesh as meshes
from jaxdiff.config import check, files
from jaxdiff.data import load_source
from jaxdiff.keys import named_key
from jaxdiff.startup import start
from jaxdiff.training.experiments import Experiment, read_batches, step_and_init
from jaxdiff.training.logging import RunLogger
from jaxdiff.training.loop import fit
from jaxdiff.training.stages import diffusion_stage

ROUNDS = 10  # of a second each, of the step alone
LINES = 40  # of the log, about
PAUSES = ("validation", "checkpoint", "samples")


def step_seconds(experiment: Experiment, config: ConfigDict, mesh: Mesh) -> float:
    """Seconds of a step on a batch that lies on the device."""
    step, create = step_and_init(experiment, config, mesh)
    state, frozen = create(named_key(config.seed, "init")), meshes.put_replicated(experiment.objective.frozen, mesh)
    (batch,) = read_batches(experiment, config, mesh, 0, 1)

    def run(times: int) -> float:
        nonlocal state
        begin = time.perf_counter()
        for _ in range(times):
            state, _ = step(state, batch, frozen)
        jax.block_until_ready(state)
        return (time.perf_counter() - begin) / times

    run(2)
    steps = max(1, round(1 / run(3)))
    return statistics.median(run(steps) for _ in range(ROUNDS))


def line_seconds(folder: pathlib.Path) -> float:
    """Seconds that a line of the log takes, written as training does."""
    logger, lines = RunLogger(folder, total_steps=1, images_per_step=1), 100
    with contextlib.redirect_stdout(io.StringIO()):
        begin = time.perf_counter()
        for step in range(lines):
            logger.scalars(
                step, dict.fromkeys(("loss", "lr", "grad_norm", "images_per_second", "step_time", "mfu"), 1.0)
            )
            logger.progress(step, {"loss": 1.0, "lr": 1.0, "grad_norm": 1.0}, 1.0, 1.0)
        seconds = time.perf_counter() - begin
    logger.close()
    return seconds / lines


class Watch:
    """When the lines of a growing metrics.jsonl came, by a thread that looks ten times a second."""

    def __init__(self, file: pathlib.Path) -> None:
        self._file, self._stop = file, threading.Event()
        self.seen: list[tuple[float, dict[str, Any]]] = []  # of training alone
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        read = 0
        while True:
            last = self._stop.is_set()
            lines = self._file.read_bytes().split(b"\n")[:-1] if self._file.exists() else []
            records = [json.loads(line) for line in lines[read:]]
            self.seen += [(time.perf_counter(), r) for r in records if "images_per_second" in r]
            read = len(lines)
            if last:
                return
            self._stop.wait(0.1)

    def close(self) -> list[tuple[float, dict[str, Any]]]:
        """Every line of training, with its time."""
        self._stop.set()
        self._thread.join()
        return self.seen


def summarise(seen: Sequence[tuple[float, dict[str, Any]]], alone: float) -> dict[str, Any]:
    """Images/s: alone (given), steady, by the clock; and seconds of each pause, by name."""
    (begin, first), (end, last) = seen[0], seen[-2]
    steady = statistics.median(record["images_per_second"] for _, record in seen[1:])
    clock = (last["images"] - first["images"]) / (end - begin)
    pauses = {name: [r[f"{name}_seconds"] for _, r in seen if f"{name}_seconds" in r] for name in PAUSES}
    return {"alone": alone, "steady": steady, "clock": clock, "pauses": pauses}


def pause_rows(pauses: Mapping[str, Sequence[float]], between: float) -> list[list[str]]:
    """Rows of the table of pauses: name, how many, seconds of the first, of another, and its share of `between`."""
    rows = []
    for name, (first, *others) in ((name, times) for name, times in pauses.items() if times):
        cells = (
            [f"{(other := statistics.median(others)):.2f}", f"{100 * other / between:.2f} %"] if others else ["", ""]
        )
        rows.append([name, str(1 + len(others)), f"{first:.2f}", *cells])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="ddpm", choices=("ddpm", "ldm_cfg"))
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the config")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for all figures")
    args = parser.parse_args(argv)
    start()
    mesh = meshes.make_mesh()
    config = ablations.get_config(f"base,{args.experiment},{args.dataset}")
    set_fields(config, args.set)
    config.update(epochs=0.0, steps=1000, sample_every=0)
    check.validate(config, mesh.size)
    train, val = load_source(config.data, "train"), load_source(config.data, "val")
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "run"
        files.claim_workdir(config, workdir)
        experiment, _ = diffusion_stage(config, workdir, train, val, mesh)
        seconds = step_seconds(experiment, config, mesh)
        config.steps = max(2 * LINES, config.warmup_steps + 1, round(60 * args.minutes / seconds))
        config.log_every = config.steps // LINES
        watch = Watch(workdir / "metrics.jsonl")
        fit(experiment, config, workdir, mesh)
        result = summarise(watch.close(), config.batch_size / seconds)
        result["line_seconds"] = line_seconds(pathlib.Path(folder) / "line")
    print(f"\n{config.name} on {mesh.size} x {device()['device']}, {config.steps:,} steps of {config.batch_size}\n")
    rows = [
        ["the step alone, on a batch of the device", f"{result['alone']:,.0f}", ""],
        ["training, steady", f"{result['steady']:,.0f}", f"{100 * result['steady'] / result['alone']:.1f} %"],
        ["training, by the clock", f"{result['clock']:,.0f}", f"{100 * result['clock'] / result['alone']:.1f} %"],
    ]
    print(markdown(("", "images/s", "of the first"), rows))
    between = config.checkpoint_every * config.batch_size / result["steady"]
    print(f"\nPauses, and their share of {config.checkpoint_every:,} steps, {between:.0f} s, between checkpoints:\n")
    columns = ("", "times", "first, s", "another, s", "share")
    print(markdown(columns, pause_rows(result["pauses"], between)))
    line = f"{1e3 * result['line_seconds']:.1f} ms"
    print(f"\nA line of the log, every {config.log_every:,} steps: {line}, while the device has its next step")
    if args.out:
        files.write_json(args.out, {**environment(), **device(), "config": config.name, **result})


if __name__ == "__main__":
    main()
