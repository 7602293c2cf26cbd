"""--mode=ladder: train, sample and score all rungs of configs/ladder.py within so many minutes."""

import pathlib
import signal
import time
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxdiff import mesh as meshes
from jaxdiff.config import files
from jaxdiff.data import load_source
from jaxdiff.errors import Interrupted
from jaxdiff.evaluation.evaluate import run_evaluate
from jaxdiff.evaluation.records import read_scores
from jaxdiff.interrupts import raising
from jaxdiff.ladder.results import write_results
from jaxdiff.ladder.rungs import FILE, check_workdir, read_ladder, rung_config, rung_names, scorings
from jaxdiff.mesh import say
from jaxdiff.training.environment import record_start
from jaxdiff.training.experiments import autoencoder_experiment
from jaxdiff.training.optimizer import total_steps
from jaxdiff.training.pace import choose_steps, measure_pace, with_steps
from jaxdiff.training.stages import diffusion_stage, run_train

WHY = {
    "recipe": "all of its recipe, which a larger budget does not exceed",
    "budget": "as many as its share of the minutes allows",
    "minimum": "config.least_steps, MORE than its share of the minutes allows",
}


def run_ladder(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Climb the ladder of `config` (checked) in `workdir`; started again, it goes on.

    Raises: Stopped on SIGTERM or SIGINT with the state saved, Interrupted where nothing is trained.
    """
    mesh = meshes.make_mesh()
    names = rung_names(config)
    say(f"{config.name} in {config.minutes:g} minutes on {mesh.size} x {mesh.devices.flat[0].device_kind}: {names}")
    if not (workdir / "config.json").exists():  # a data set that is not there leaves nothing behind
        for name in ("ddpm", "ldm"):
            load_source(rung_config(config, name).data, "train")
    check_workdir(config, workdir)
    if meshes.is_main():
        workdir.mkdir(parents=True, exist_ok=True)
        files.save(config, workdir / "config.json")
        record_start(workdir, mesh, mode="ladder")
    meshes.barrier("ladder")
    with _Interruptible():
        for name in names:
            _climb(config, name, workdir, mesh)
    say(f"all rungs are done; tables: {workdir / 'RESULTS.md'}")


def _climb(config: ConfigDict, name: str, workdir: pathlib.Path, mesh: Mesh) -> None:
    """One rung: decide on its steps, train, score."""
    own, folder = rung_config(config, name), workdir / name
    decided = _decide(config, name, own, workdir, mesh)
    _write(workdir)
    with_steps(own, decided["steps"], decided["images"])
    if not read_scores(folder)["validation"]:  # it is the last that a training writes, but for its scores
        with _Timed(workdir, name, "train_seconds"):
            run_train(own, folder)
        _write(workdir)
    for scored in scorings(config, name, own):
        with _Timed(workdir, name, "score_seconds"):
            run_evaluate(scored, folder, None, again=False)
        _write(workdir)


def _write(workdir: pathlib.Path) -> None:
    if meshes.is_main():
        write_results(workdir)
    meshes.barrier("results")


def _decide(config: ConfigDict, name: str, own: ConfigDict, workdir: pathlib.Path, mesh: Mesh) -> dict[str, Any]:
    """What ladder.json says of a rung; where it says nothing yet, its steps are measured, chosen and put down."""
    if name not in read_ladder(workdir)["rungs"]:
        begin = time.monotonic()
        train, val = load_source(own.data, "train"), load_source(own.data, "val")
        if own.experiment == "vae":
            experiment = autoencoder_experiment(own, train, val, mesh)
        else:
            experiment, _ = diffusion_stage(own, workdir / name, train, val, mesh)
        pace = measure_pace(experiment, own, mesh)
        recipe = total_steps(own, len(train))
        share = 60 * config.minutes * config.shares[name]
        left = share - (time.monotonic() - begin)  # measuring is a part of it
        length = choose_steps(pace, left, recipe=recipe, least=config.least_steps)
        if meshes.is_main():
            decision = {
                **length._asdict(),
                "recipe": recipe,
                "share_seconds": share,
                **pace._asdict(),
                "images": len(train),
                "image_size": own.data.image_size,
                "classes": len(train.class_names),
                "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
                "train_seconds": 0.0,
                "score_seconds": 0.0,
            }
            _change(workdir, name, decision)
        meshes.barrier(f"steps of {name}")
    decided = read_ladder(workdir)["rungs"][name]
    say(
        f"{name}: {decided['steps']:,} of the recipe's {decided['recipe']:,} steps, {WHY[decided['limit']]} "
        f"({decided['share_seconds']:.0f} s; {decided['step_seconds']:.3g} s a step, compiled in "
        f"{decided['compile_seconds']:.0f} s)"
    )
    return decided


def _change(workdir: pathlib.Path, name: str, values: dict[str, Any]) -> None:
    """Put values of a rung into ladder.json."""
    content = read_ladder(workdir)
    content["rungs"][name] = {**content["rungs"].get(name, {}), **values}
    files.write_json(workdir / FILE, content)


class _Timed:
    """Adds the seconds inside, also of what is stopped, to a field of a rung in ladder.json."""

    def __init__(self, workdir: pathlib.Path, name: str, field: str) -> None:
        self._workdir, self._name, self._field = workdir, name, field

    def __enter__(self) -> None:
        self._begin = time.monotonic()

    def __exit__(self, *error: Any) -> None:
        if meshes.is_main():
            before = read_ladder(self._workdir)["rungs"][self._name][self._field]
            _change(self._workdir, self._name, {self._field: before + time.monotonic() - self._begin})


class _Interruptible:
    """Makes SIGTERM and SIGINT an Interrupted where nothing is trained; training itself notes them first, and saves."""

    def __enter__(self) -> None:
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._old = {number: signal.signal(number, raising(Interrupted)) for number in numbers}

    def __exit__(self, *error: Any) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
