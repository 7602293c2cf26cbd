"""What a run tells about itself: TensorBoard, metrics.jsonl, and a line of progress."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxdiff.training.clu_tensorboard import SummaryWriter, metric_writers

RESERVED = ("step", "stage", "images")
SHORT = {"grad_norm": "grad"}


class RunLogger:
    """Writes `workdir`/metrics.jsonl and `workdir`/tensorboard/[stage/], and prints progress.

    Args:
        workdir: Folder of the run; made if need be.
        total_steps: Steps of the stage, for the time that is left.
        images_per_step: Global batch size; metrics.jsonl tells how many images were seen.
        enabled: False on all processes but one: nothing is written or printed.
        stage: Name that keeps apart the stages of one workdir, whose steps all count from 1.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        total_steps: int,
        images_per_step: int,
        enabled: bool = True,
        stage: str = "",
    ) -> None:
        self._total_steps, self._images_per_step = total_steps, images_per_step
        self._enabled, self._stage = enabled, stage
        self._line_open = False
        if enabled:
            self._events = SummaryWriter(str(workdir / "tensorboard" / stage))
            self._writer = metric_writers.MultiWriter([metric_writers.LoggingWriter(), self._events])
            self._path = workdir / "metrics.jsonl"
            _rewrite(self._path, lambda record: True)  # an earlier run may have died in the middle of a line
            self._jsonl = self._path.open("a", encoding="utf-8")

    def resume(self, step: int) -> None:
        """Forget what an earlier run recorded of this stage after `step`, where training goes on (0 = all).

        Other stages' lines, and lines that are no records, stay. Call it before anything is recorded.
        """
        if not self._enabled:
            return
        self._jsonl.close()
        _rewrite(self._path, lambda r: r.get("stage") != self._stage or r.get("step", 0) <= step)
        self._jsonl = self._path.open("a", encoding="utf-8")
        self._events.discard_after(step)

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record numbers; NaN and infinity are null in metrics.jsonl.

        Raises: ValueError when a name is one of `RESERVED`.
        """
        if not self._enabled:
            return
        if taken := [name for name in scalars if name in RESERVED]:
            raise ValueError(f"scalar {taken[0]!r}: every line of metrics.jsonl has a field of that name already")
        values = {name: float(value) for name, value in scalars.items()}
        self._writer.write_scalars(step, values)
        record: dict[str, Any] = {"step": step, "stage": self._stage, "images": step * self._images_per_step}
        record |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._jsonl.write(json.dumps(record, allow_nan=False) + "\n")
        self._jsonl.flush()

    def images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "h w 3"]]) -> None:
        """Record images in TensorBoard."""
        if self._enabled:
            self._writer.write_images(step, images)

    def progress(self, step: int, scalars: Mapping[str, float], images_per_second: float, step_time: float) -> None:
        """Print one line, over the last one on a terminal; `step_time` in seconds per step."""
        if not self._enabled:
            return
        position = f"{self._stage or 'train'}  {step:,}/{self._total_steps:,}"
        values = [f"{SHORT.get(name, name)} {value:.3g}" for name, value in scalars.items()]
        speed = [
            f"{images_per_second:{',.0f' if images_per_second >= 10 else '.1f'}} img/s",
            f"{1000 * step_time:{',.0f' if step_time >= 0.01 else '.1f'}} ms/step",
            f"ETA {format_duration((self._total_steps - step) * step_time)}",
        ]
        line = "  ".join([position, *values, *speed])
        if not sys.stdout.isatty():
            print(line, flush=True)
            return
        columns = shutil.get_terminal_size().columns
        while len(line) >= columns and values:  # a line that wraps could not be written over
            values.pop()
            line = "  ".join([position, *values, *speed])
        print(f"\r\033[K{line[: columns - 1]}", end="", flush=True)
        self._line_open = True

    def close(self) -> None:
        """Close the files and end the line of progress; may be called twice."""
        if not self._enabled:
            return
        self._enabled = False
        if self._line_open:
            print(flush=True)
        self._jsonl.close()
        self._writer.close()


class Rate(NamedTuple):
    """Speed over a window of steps."""

    images_per_second: float
    step_time: float  # seconds
    pauses: dict[str, float]  # seconds by name, which are in neither


class StepTimer:
    """Measures speed from one lap to the next, without pauses.

    Args:
        images_per_step: Global batch size.
        clock: Returns seconds.
    """

    def __init__(self, images_per_step: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._images_per_step, self._clock = images_per_step, clock
        self.start(0)

    def start(self, step: int) -> None:
        """Begin a window at `step`, dropping what was measured."""
        self._step, self._since = step, self._clock()
        self._pauses: dict[str, float] = {}

    def lap(self, step: int) -> Rate:
        """Speed since the last lap or start, and the beginning of the next window.

        Raises: ValueError when there was no step in between.
        """
        steps = step - self._step
        if steps < 1:
            raise ValueError(f"a lap ends at step {step}, but began at step {self._step}")
        now = self._clock()
        pauses = self._pauses
        seconds = max(now - self._since - sum(pauses.values()), 1e-9)
        self._step, self._since, self._pauses = step, now, {}
        return Rate(steps * self._images_per_step / seconds, seconds / steps, pauses)

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Leave out the time inside: sampling, evaluation, checkpoints. Not nested, and no lap inside."""
        begin = self._clock()
        try:
            yield
        finally:
            self._pauses[name] = self._pauses.get(name, 0.0) + self._clock() - begin


def format_duration(seconds: float) -> str:
    """Seconds as "3:12" or "27:03:12"; "?" where they are not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _rewrite(path: pathlib.Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop a torn last line and the records not to be kept; in one move, so that a crash loses nothing."""
    old = path.read_bytes() if path.exists() else b""
    *lines, rest = old.split(b"\n")
    kept = [line for line in lines if (record := _parse(line)) is None or keep(record)]
    if (record := _parse(rest)) and keep(record):  # whole but for its line end
        kept.append(rest)
    new = b"".join(line + b"\n" for line in kept)
    if new != old:
        temporary = path.with_name(path.name + ".new")
        with temporary.open("wb") as file:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record in a line of metrics.jsonl, None where there is none."""
    try:
        record = json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        return None
    return record if isinstance(record, dict) else None
