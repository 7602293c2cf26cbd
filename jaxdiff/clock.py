"""Where the time goes: seconds by part, with compilation apart."""

import contextlib
import time
from collections.abc import Iterator

import jax

_compiling = [0.0]


def _note(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith("/jax/core/compile/"):
        _compiling[0] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_note)


def compile_seconds() -> float:
    """Seconds that this process has spent on tracing and compiling, or on reading what was compiled before."""
    return _compiling[0]


class Stopwatch:
    """Adds up the seconds of named parts; those that JAX compiles in count as "compile", and not in the part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"compile": 0.0}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`; results have to be on the host by the end of it. Not nested."""
        begin, compiled = time.perf_counter(), compile_seconds()
        yield
        compiling = compile_seconds() - compiled
        self.seconds["compile"] += compiling
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin - compiling
