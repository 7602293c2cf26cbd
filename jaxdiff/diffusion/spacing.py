"""Which timesteps a sampler visits. A new spacing is one function here and one line in `SPACINGS`.

A spacing returns (t, t_prev) in the order of sampling: the network is called at t, and the step leads to the noise
level of t_prev, where -1 means fully denoised.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Int64

from jaxdiff.errors import ConfigError

Steps = Int64[np.ndarray, " n"]
Pairs = tuple[Steps, Steps]


def leading(num_steps: int, steps: int) -> Pairs:
    """Multiples of s = num_steps // steps, the first of them 0: never the noisiest timestep (DDIM; diffusers)."""
    t = np.arange(steps)[::-1] * (num_steps // steps)
    return t, np.append(t[1:], -1)


def trailing(num_steps: int, steps: int) -> Pairs:
    """From num_steps - 1 down by num_steps / steps: always the noisiest timestep (arXiv 2305.08891, section 3.3)."""
    t = np.round(num_steps - np.arange(steps) * (num_steps / steps)).astype(np.int64) - 1
    return t, np.append(t[1:], -1)


def linspace(num_steps: int, steps: int) -> Pairs:
    """Both ends and evenly between, rounded; t_prev = t - num_steps // steps, as diffusers' DDIM has it.

    That t_prev is not quite the next t: the step ends at a slightly different noise level than the next one assumes.
    `adm` visits the same timesteps without that.
    """
    t = np.round(np.linspace(num_steps - 1, 0, steps)).astype(np.int64)
    return t, np.maximum(t - num_steps // steps, -1)


def adm(num_steps: int, steps: int) -> Pairs:
    """Both ends and evenly between, each step leading to the next timestep (guided-diffusion's "50")."""
    t = sections(num_steps, str(steps))[::-1]
    return t, np.append(t[1:], -1)


def dpm(num_steps: int, steps: int) -> Pairs:
    """From num_steps - 1 evenly to 0, which is left out: the last step goes to the clean end from a timestep above it.

    The timesteps of DPM-Solver, which diffusers calls linspace for that solver and for UniPC.
    """
    t = np.round(np.linspace(num_steps - 1, 0, steps + 1)).astype(np.int64)[:-1]
    return t, np.append(t[1:], -1)


SPACINGS: Mapping[str, Callable[[int, int], Pairs]] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "adm": adm,
    "dpm": dpm,
}


def timestep_pairs(spacing: str, num_steps: int, steps: int) -> Pairs:
    """The pairs of spacing `spacing` for `steps` of `num_steps` timesteps.

    Raises: ConfigError for an unknown spacing or steps outside 1..num_steps.
    """
    if spacing not in SPACINGS:
        raise ConfigError(f"sample.spacing = {spacing!r}: must be one of {', '.join(SPACINGS)}")
    if not 1 <= steps <= num_steps:
        raise ConfigError(f"sample.steps = {steps}: must be in 1..{num_steps} (diffusion.num_steps)")
    t, t_prev = SPACINGS[spacing](num_steps, steps)
    if len(np.unique(t)) < steps:  # dpm leaves the last timestep out
        raise ConfigError(f"sample.steps = {steps}: must be less than {num_steps} with sample.spacing = {spacing!r}")
    return t, t_prev


def sections(num_steps: int, counts: str) -> Steps:
    """The timesteps that guided-diffusion's --timestep_respacing keeps, ascending.

    Args: counts, "ddimN": N timesteps at one integer stride from 0; else numbers with commas between: the range is
      cut into as many equal sections, and as many timesteps are kept of each, its ends among them.
    Raises: ConfigError when a section has fewer timesteps than are asked of it, or no stride gives N.
    """
    if counts.startswith("ddim"):
        wanted = int(counts.removeprefix("ddim"))
        for stride in range(1, num_steps):
            if len(t := np.arange(0, num_steps, stride)) == wanted:
                return t
        raise ConfigError(f"timesteps {counts!r}: no integer stride takes exactly {wanted} of {num_steps} timesteps")
    numbers = [int(n) for n in counts.split(",")]
    kept, start = [], 0
    for i, n in enumerate(numbers):
        size = num_steps // len(numbers) + (i < num_steps % len(numbers))
        if not 1 <= n <= size:
            raise ConfigError(f"timesteps {counts!r}: section {i} has {size} timesteps, of which {n} cannot be kept")
        # One timestep of a section is its first, as there; one of the whole range has to be its last, or a sampler
        # would begin at the clean end.
        first = size - 1 if len(numbers) == n == 1 else 0
        kept.append(start + np.round(first + np.arange(n) * ((size - 1) / max(n - 1, 1))).astype(np.int64))
        start += size
    return np.concatenate(kept)
