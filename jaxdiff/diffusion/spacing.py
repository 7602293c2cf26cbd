"""Which timesteps a sampler visits. A new spacing is one function here and one line in `SPACINGS`."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Int64

from jaxdiff.errors import ConfigError

Steps = Int64[np.ndarray, " n"]


def leading(num_steps: int, steps: int) -> Steps:
    """0, s, 2s, ... with s = num_steps // steps, from the last down: never the noisiest timestep."""
    return np.arange(steps)[::-1] * (num_steps // steps)


def trailing(num_steps: int, steps: int) -> Steps:
    """num_steps - 1, and then down by num_steps / steps, rounded: always the noisiest timestep."""
    return np.round(num_steps - np.arange(steps) * (num_steps / steps)).astype(np.int64) - 1


def linspace(num_steps: int, steps: int) -> Steps:
    """Evenly from num_steps - 1 down to 0, rounded."""
    return np.round(np.linspace(0, num_steps - 1, steps)).astype(np.int64)[::-1]


SPACINGS: Mapping[str, Callable[[int, int], Steps]] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
}


def timestep_pairs(spacing: str, num_steps: int, steps: int) -> tuple[Steps, Steps]:
    """(t, t_prev) in the order of sampling; t_prev = -1 means fully denoised."""
    if spacing not in SPACINGS:
        raise ConfigError(f"sample.spacing = {spacing!r}: must be one of {', '.join(SPACINGS)}")
    if not 1 <= steps <= num_steps:
        raise ConfigError(f"sample.steps = {steps}: must be in 1..{num_steps}")
    t = SPACINGS[spacing](num_steps, steps)
    return t, np.append(t[1:], -1)
