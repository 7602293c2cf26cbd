"""Checkpoints of a workdir: written while training goes on, the best and the last few kept."""

import contextlib
import functools
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from textwrap import shorten
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.layout import Format, Layout
from orbax.checkpoint import checkpoint_managers as policies

from jaxdiff.errors import ConfigError
from jaxdiff.training.step import TrainState

MONITOR = "val_loss"  # also in a checkpoint's meta, for whoever goes on
NO_LOSS = 1e30
# What the parts of a state are called in a checkpoint.
STATE_ITEMS = {
    "params": "params",
    "ema": "ema",
    "optimizer": "opt_state",
    "critic": "critic",
    "critic_optimizer": "critic_opt_state",
    "memory": "memory",
    "averages": "averages",
}


def state_items(state: TrainState) -> dict[str, Any]:
    """The parts of a state that there are, by their names in a checkpoint."""
    return {name: part for name, field in STATE_ITEMS.items() if (part := getattr(state, field)) != ()}


@functools.cache
def _laid_out(formats: tuple[Format, ...]) -> Any:
    return jax.jit(lambda *arrays: arrays, out_shardings=formats)


def in_order(tree: Any) -> Any:
    """The arrays without the layouts that kernels have on a GPU, of which Orbax need not know."""
    leaves, structure = jax.tree.flatten(tree)
    orders = [tuple(range(x.ndim)) for x in leaves]
    odd = [i for i, x in enumerate(leaves) if x.format.layout.major_to_minor != orders[i]]
    if odd:  # one program for all: array by array it takes seconds to compile
        formats = tuple(Format(Layout(orders[i]), leaves[i].sharding) for i in odd)
        for i, x in zip(odd, _laid_out(formats)(*(leaves[i] for i in odd)), strict=True):
            leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


def on_host(tree: Any) -> Any:
    """Copies of the arrays of this process's devices in the host's memory, as NumPy has them."""

    def pinned(x: jax.Array) -> Any:
        return x.sharding.with_memory_kind("pinned_host")

    # One copy of what all devices hold.
    tree = in_order(jax.tree.map(lambda x: x.addressable_data(0) if x.is_fully_replicated else x, tree))
    return jax.tree.map(np.asarray, jax.block_until_ready(jax.device_put(tree, jax.tree.map(pinned, tree))))


class LastAndBest(policies.PreservationPolicy):
    """Keeps the last `last` checkpoints, the one of the lowest of the `losses` by step, if any has one, and all that
    are not in these: of an earlier version, or damaged, any may be the best."""

    def __init__(self, last: int, losses: dict[int, float]) -> None:
        self._last, self._losses = last, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Of each, in the order of their steps."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        losses = sorted((self._losses[step], -step) for step in steps if step in self._losses)
        kept = {-step for loss, step in losses[:1] if loss < NO_LOSS} | set(steps[-self._last :])
        return [step in kept or step not in self._losses for step in steps]


class Checkpoints:
    """The folder `workdir/checkpoints`, an Orbax CheckpointManager.

    A checkpoint holds the items params, ema, optimizer (each restorable alone), critic and critic_optimizer where the
    loss is trained too, memory where it has one, averages (each restorable alone) where there are more than `ema`, and
    meta: a JSON object with the position in the data and what sampling has to know. With `keep`, saving leaves the last
    `keep` checkpoints and the one of the lowest validation loss.
    """

    def __init__(self, workdir: pathlib.Path, keep: int | None = None) -> None:
        self._losses: dict[int, float] = {}
        policy = None if keep is None else LastAndBest(keep, self._losses)
        self.folder = (workdir / "checkpoints").resolve()
        writing = keep is not None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, create=writing, read_only=not writing, cleanup_tmp_directories=writing
        )
        names = (*STATE_ITEMS, "meta")
        self._orbax = ocp.CheckpointManager(self.folder, options=options, item_names=names)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[Any] | None = None
        self._closed = False
        for step in self.steps if writing else ():  # what an earlier process saved
            with contextlib.suppress(OSError, ValueError, KeyError):  # damaged, or of an earlier version
                self._losses[step] = self._read_meta(step)[MONITOR]

    @property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's, which has what was saved; what went wrong in that is raised here."""
        if self._saving:
            with self._writing():
                self._saving.result()
        return self._orbax

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """ConfigError of what goes wrong in saving, a full disk as a rule."""
        try:
            yield
        except ConfigError:  # said before
            raise
        except Exception as error:  # Orbax and TensorStore raise all sorts of things
            raise ConfigError(
                f"{self.folder}: a checkpoint cannot be written ({_told(error)}); the same command goes on from the "
                "last one that could"
            ) from error

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """ConfigError of what goes wrong in restoring, a damaged file as a rule."""
        try:
            yield
        except Exception as error:  # likewise
            others = [other for other in self.steps if other != step]
            then = f"step {others[-1]} is the newest" if others else "training begins anew"
            raise ConfigError(
                f"{self.folder / str(step)}: cannot be read ({_told(error)}): it is damaged, or of another version of "
                f"jaxdiff or its libraries; without that folder {then}"
            ) from error

    @property
    def latest(self) -> int | None:
        """Newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any], val_loss: float = math.inf) -> None:
        """Begin to write the state as of its step; returns once the device memory may be reused."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return

        items = state_items(state)
        alone = jax.process_count() == 1
        items = {name: ocp.args.StandardSave(x) for name, x in (on_host if alone else in_order)(items).items()}
        self._losses[step] = val_loss if val_loss < NO_LOSS else NO_LOSS  # it may be no number
        meta = {**meta, MONITOR: self._losses[step]}
        args = ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta))
        if alone:  # what Orbax does with a thousand arrays before it writes takes seconds

            def save() -> None:
                self._orbax.save(step, args=args)
                self._orbax.wait_until_finished()  # which raises, once, what went wrong in writing

            self._saving = self._thread.submit(save)
        else:
            with self._writing():
                self._orbax.save(step, args=args)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Newest state, in the shapes and shardings of `abstract`, and its meta."""
        step = self.pick(None)
        tree = ocp.args.StandardRestore
        items = ocp.args.Composite(
            **{name: tree(part) for name, part in state_items(abstract).items()}, meta=ocp.args.JsonRestore()
        )
        with self._reading(step):
            got = self._manager.restore(step, args=items)
        at = jax.device_put(jax.numpy.asarray(step, jax.numpy.int32), abstract.step.sharding)
        parts = {STATE_ITEMS[name]: got[name] for name in state_items(abstract)}
        return abstract._replace(step=at, **parts), _without_loss(got.meta)

    def restore_params(self, abstract: Any, step: int | None, weights: str) -> Any:
        """Only the parameters, `weights` "ema", "raw" or the name of another average, of a step (None = newest)."""
        step = self.pick(step)
        if weights not in ("ema", "raw"):
            tree = {weights: abstract}
            only = ocp.args.PyTreeRestore(
                tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
            )
            with self._reading(step), ocp.PyTreeCheckpointer() as reader:  # the manager reads items whole
                return reader.restore(self.folder / str(step) / "averages", args=only)[weights]
        item = "ema" if weights == "ema" else "params"
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
        with self._reading(step):
            return self._manager.restore(step, args=args)[item]

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The meta of a step (None = newest)."""
        step = self.pick(step)
        with self._reading(step):
            return _without_loss(self._read_meta(step))

    def _read_meta(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def pick(self, step: int | None) -> int:
        """`step`, or the newest where it is None; ConfigError naming the steps there are when there is none such."""
        if not self.steps:
            raise ConfigError(f"--workdir: {self.folder.parent} has no checkpoint yet; train first")
        if step is not None and step not in self.steps:
            raise ConfigError(f"--step={step}: {self.folder} has steps {', '.join(map(str, self.steps))}")
        return self.steps[-1] if step is None else step

    def should_stop(self, step: int, signum: int) -> bool:
        """Whether to stop after `step`: this process was signalled, or (of several) all have agreed on this step."""
        return self._manager.reached_preemption(step) if jax.process_count() > 1 else signum != 0

    def wait(self) -> None:
        """Until everything is written."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and release the folder; may be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            with self._writing():
                self._manager.close()
        finally:
            self._thread.shutdown()


def _told(error: Exception) -> str:
    """What an error says, on one line and not too long."""
    text = str(error.__cause__ or error) or type(error).__name__
    if number := re.search(r"os_error_code='(\d+)'", text):  # at the end of what TensorStore says
        return os.strerror(int(number[1]))
    return shorten(text, 200, placeholder=" ...")


def _without_loss(meta: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in meta.items() if name != MONITOR}
