"""The training loop of one stage: restore, step, log, validate, save, stop in good order."""

import contextlib
import pathlib
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxdiff import images
from jaxdiff import mesh as meshes
from jaxdiff.build import compute_dtype
from jaxdiff.data import every_row
from jaxdiff.errors import ConfigError, Stopped, shortened
from jaxdiff.keys import named_key
from jaxdiff.mesh import say
from jaxdiff.training import averages
from jaxdiff.training.checkpoint import MONITOR, Checkpoints
from jaxdiff.training.compiling import Compiling, abstract_batch
from jaxdiff.training.environment import record_compilation
from jaxdiff.training.experiments import Experiment, read_batches, step_and_init
from jaxdiff.training.flops import least_step_time
from jaxdiff.training.logging import RunLogger, StepTimer
from jaxdiff.training.optimizer import total_steps
from jaxdiff.training.snapshots import Snapshots, state_weights
from jaxdiff.training.step import TrainState, abstract_state, formats, make_eval_step


class StopSignal:
    """Notes SIGTERM and SIGINT instead of dying of them; a second one is obeyed at once.

    Of several processes JAX's own service notes SIGTERM, and all stop after the same step (`Checkpoints.should_stop`).
    """

    def __init__(self) -> None:
        self.signum = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ():
            self._old[number] = signal.signal(number, self._note)
        return self

    def _note(self, signum: int, frame: Any) -> None:
        self.signum = signum
        signal.signal(signum, self._old[signum])

    def __exit__(self, *error: Any) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)


def until_stopped(batches: Iterator[Any], stop: StopSignal) -> Iterator[Any]:
    """The batches; no more of them where they fail after a signal, which processes that read may have died of."""
    try:
        yield from batches
    except Exception:
        if not stop.signum:
            raise


class Result(NamedTuple):
    """A finished stage: its state and its last validation metrics."""

    state: TrainState
    validation: dict[str, float]


def fit(
    experiment: Experiment,
    config: ConfigDict,
    workdir: pathlib.Path,
    mesh: Mesh,
    *,
    stop_at: int | None = None,
) -> Result:
    """Train a stage to its end in `workdir`, from its newest checkpoint if there is one.

    `config` holds the fields of `fields.recipe()`, and seed, dtype and data. With `stop_at` it stops after that many
    steps. Raises: Stopped on SIGTERM, SIGINT or at `stop_at`, with the state saved.
    """
    with contextlib.closing(Checkpoints(workdir, config.keep)) as checkpoints:
        if checkpoints.latest is not None:
            check_data(experiment, checkpoints.meta())
        logger = RunLogger(
            workdir,
            total_steps=total_steps(config, len(experiment.train)),
            images_per_step=config.batch_size,
            enabled=meshes.is_main(),
            stage=experiment.stage,
        )
        with contextlib.closing(logger):
            return _fit(experiment, config, workdir, mesh, checkpoints, logger, stop_at)


def _fit(
    experiment: Experiment,
    config: ConfigDict,
    workdir: pathlib.Path,
    mesh: Mesh,
    checkpoints: Checkpoints,
    logger: RunLogger,
    stop_at: int | None,
) -> Result:
    total = total_steps(config, len(experiment.train))
    frozen, power = meshes.put_replicated(experiment.objective.frozen, mesh), averages.widths(config)
    validator = Validator(experiment, config, mesh, frozen)

    snapshots = Snapshots(workdir)
    train_step, create = step_and_init(experiment, config, mesh)
    abstract = abstract_state(create, mesh)
    start, compiling = 0, None
    if (checkpoints.latest or 0) < total:
        compiling = Compiling(train_step, abstract, abstract_batch(experiment.train, config, mesh), frozen)
    if checkpoints.latest is None:
        state = create(named_key(config.seed, "init"))
    else:
        state, meta = checkpoints.restore(abstract)
        state = jax.device_put(state, formats(state, mesh))
        start = meta["data"]["batches"]
        say(f"{experiment.stage}: going on from step {start:,} of {total:,}")

    logger.resume(start)  # forgets what a run that died after its last checkpoint recorded
    timer = StepTimer(config.batch_size)

    def save(step: int, val_loss: float = np.inf) -> None:
        position = {"batches": step, "images": len(experiment.train)}
        checkpoints.save(state, {**experiment.meta, "data": position}, val_loss)

    def read(step: int, metrics: dict[str, Any]) -> None:
        jax.block_until_ready(metrics)
        if step % config.log_every and step != total:
            return
        values = {name: float(value) for name, value in metrics.items()}
        rate = timer.lap(step)
        speed = {"images_per_second": rate.images_per_second, "step_time": rate.step_time}
        speed |= {f"{name}_seconds": seconds for name, seconds in rate.pauses.items()}
        if least:  # the share of the devices' peak: "model FLOPs utilisation"
            speed["mfu"] = least / rate.step_time
        logger.scalars(step, {**values, **speed})
        logger.progress(step, values, rate.images_per_second, rate.step_time)

    def render(step: int) -> None:
        sheets = [experiment.render(params) for params in (state.params, state.ema)]
        if meshes.is_main():
            sheet = images.side_by_side(*sheets)
            logger.images(step, {"raw_left_ema_right": sheet})
            images.save_png(workdir / "samples" / f"{experiment.stage}-{step:07d}-raw-ema.png", sheet)

    batches = read_batches(experiment, config, mesh, start, total)
    pending: tuple[int, dict[str, Any]] | None = None
    least = None
    with StopSignal() as stop, contextlib.closing(checkpoints):  # it waits for what is being saved, come what may
        done = start
        for done, batch in enumerate(until_stopped(batches, stop), start + 1):
            if compiling:  # waited for ahead of the first step, so that no step's time has it in it
                compiled, seconds = compiling.result()
                what = "the step of an earlier start found" if compiling.found else "step compiled"
                say(f"{experiment.stage}: {what} in {seconds:.0f} s")
                if meshes.is_main():
                    record_compilation(workdir, experiment.stage, seconds)
                    count, dtype = compiling.flops, compute_dtype(config)
                    least = least_step_time(experiment.stage, count, config.batch_size, dtype, mesh.size)
                compiling = None
                timer.start(start)
            state, metrics = compiled(state, batch, frozen)
            # The metrics of a step are read when the next one is under way, so that the devices never wait, and no
            # more than two are, so that batches do not pile up on them.
            if pending:
                read(*pending)
            pending = (done, metrics)
            last = done == total
            # Before the checkpoint: whoever goes on from that one has all snapshots up to it.
            if config.ema_snapshot_every and done % config.ema_snapshot_every == 0:
                jax.block_until_ready(metrics)
                with timer.pause("snapshot"):
                    snapshots.save(done, {name: state.averages[name] for name in power})
            if done % config.checkpoint_every == 0 or last:
                jax.block_until_ready(metrics)
                with timer.pause("validation"):
                    logger.scalars(done, validator(state.ema))
                with timer.pause("checkpoint"):
                    save(done, validator.last[MONITOR])
            if last or (config.sample_every and done % config.sample_every == 0):
                jax.block_until_ready(metrics)
                with timer.pause("samples"):
                    render(done)
            if experiment.score and done % config.eval.every == 0 and not last:  # at the end the run itself is scored
                jax.block_until_ready(metrics)
                with timer.pause("scores"):
                    logger.scalars(done, experiment.score(state_weights(state, config.sample.weights, config)))
            if not last and (done == stop_at or checkpoints.should_stop(done, stop.signum)):
                read(done, metrics)
                save(done)
                raise Stopped(done, total, stop.signum or (0 if done == stop_at else signal.SIGTERM))
        if pending:
            read(*pending)
        if done < total:
            save(done)
            raise Stopped(done, total, stop.signum)
    if stop.signum:  # while the last step was saved, or its samples drawn
        raise Stopped(total, total, stop.signum)
    return Result(state, validator.last or validator(state.ema))


def check_data(experiment: Experiment, meta: dict[str, Any]) -> None:
    """ConfigError when the data are not those that the checkpoint with `meta` was trained on."""
    names, count = list(experiment.train.class_names), len(experiment.train)
    if names != meta["class_names"] or count != meta["data"]["images"]:
        raise ConfigError(
            f"config.data: these are {count:,} images in classes {shortened(names)}; the run was begun with "
            f"{meta['data']['images']:,} in {shortened(meta['class_names'])}; give that, or another --workdir"
        )


class Validator:
    """Means of the losses over the validation images, with the same noise every time."""

    def __init__(self, experiment: Experiment, config: ConfigDict, mesh: Mesh, frozen: Any) -> None:
        self.last: dict[str, float] = {}
        self._source, self._batch_size, self._mesh, self._frozen = experiment.val, config.batch_size, mesh, frozen
        self._step = make_eval_step(experiment.objective, mesh, seed=config.seed)

    def __call__(self, params: Any) -> dict[str, float]:
        """{"val_loss": mean, "val_<metric>": mean, ...} at the parameters."""
        sums: dict[str, float] = {}
        for i, batch in enumerate(every_row(self._source, self._mesh, batch_size=self._batch_size)):
            for name, value in self._step(params, batch, jnp.int32(i), self._frozen).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        weight = sums.pop("weight")
        self.last = {f"val_{name}": value / weight for name, value in sums.items()}
        return self.last
