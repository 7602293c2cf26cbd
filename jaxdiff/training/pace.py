"""How long a training's steps take on this machine, and how many of them there is time for."""

import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxdiff import mesh as meshes
from jaxdiff.keys import named_key
from jaxdiff.training.experiments import Experiment, read_batches, step_and_init
from jaxdiff.training.optimizer import total_steps

WARM, TIMED = 2, 8  # steps before the clock starts, and under it


class Pace(NamedTuple):
    """Seconds for an optimiser step, and for compiling it."""

    step_seconds: float
    compile_seconds: float


class Length(NamedTuple):
    """Steps of a training, and what set their number: "recipe", "budget" or "minimum"."""

    steps: int
    limit: str


def measure_pace(experiment: Experiment, config: ConfigDict, mesh: Mesh) -> Pace:
    """Compile a stage's training step and time a few of them on its first batches; nothing is kept."""
    step, create = step_and_init(experiment, config, mesh)
    state, frozen = create(named_key(config.seed, "init")), meshes.put_replicated(experiment.objective.frozen, mesh)
    compiled = None
    begin = time.perf_counter()
    for k, batch in enumerate(read_batches(experiment, config, mesh, 0, WARM + TIMED)):
        if compiled is None:
            begin = time.perf_counter()
            compiled = step.lower(state, batch, frozen).compile()
            compile_seconds = time.perf_counter() - begin
        state, metrics = compiled(state, batch, frozen)
        if k == WARM - 1:
            jax.block_until_ready(metrics)
            begin = time.perf_counter()
    jax.block_until_ready(metrics)
    return Pace((time.perf_counter() - begin) / TIMED, compile_seconds)


def choose_steps(pace: Pace, seconds: float, *, recipe: int, least: int) -> Length:
    """Steps, and the compilation before them, that fit into `seconds`: at most `recipe`, at least `least` of them."""
    affordable = int(max(0.0, seconds - pace.compile_seconds) / pace.step_seconds)
    if affordable >= recipe:
        return Length(recipe, "recipe")
    if affordable < (least := min(least, recipe)):
        return Length(least, "minimum")
    return Length(affordable, "budget")


def with_steps(config: ConfigDict, steps: int, num_images: int) -> None:
    """Give the fields of a recipe so many steps; warm-up and what comes every so many steps shrink with them."""
    share = steps / total_steps(config, num_images)
    config.epochs, config.steps = 0.0, steps
    config.warmup_steps = min(int(config.warmup_steps * share), steps - 1)
    config.log_every = max(1, min(config.log_every, steps // 10))
    for field in ("sample_every", "checkpoint_every", "ema_snapshot_every"):
        if config[field]:
            config[field] = max(1, round(config[field] * share))
