"""Noise schedules. A new one is one function here and one line in `SCHEDULES`."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from jaxdiff.errors import ConfigError

Table = Float64[np.ndarray, " T"]


class Schedule(NamedTuple):
    """Tables of the forward process over t = 0..T-1, in float64 on the host."""

    betas: Table
    alphas_cumprod: Table

    @property
    def alphas_cumprod_prev(self) -> Table:
        """alphas_cumprod at t-1, which is 1 before the first step."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def posterior_variance(self) -> Table:
        """Variance of q(x_{t-1} | x_t, x_0): beta (1 - abar_prev) / (1 - abar), 0 at t = 0 (DDPM eq. 7)."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance_clipped(self) -> Table:
        """Its logarithm, the value of t = 1 standing in for that of t = 0, which is -inf."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1], variance[1:]))


def linear(num_steps: int, beta_start: float, beta_end: float) -> Table:
    """Betas linear in t (Ho et al. 2020); the end points are given for T = 1000 and scaled by 1000 / T."""
    scale = 1000 / num_steps
    return np.linspace(scale * beta_start, scale * beta_end, num_steps)


def scaled_linear(num_steps: int, beta_start: float, beta_end: float) -> Table:
    """Square roots of the betas linear in t (Rombach et al. 2022); end points as in `linear`."""
    scale = 1000 / num_steps
    return np.linspace((scale * beta_start) ** 0.5, (scale * beta_end) ** 0.5, num_steps) ** 2


def cosine(num_steps: int, beta_start: float, beta_end: float) -> Table:
    """Betas of abar(u) = cos^2((u + 0.008) / 1.008 * pi / 2), at most 0.999 (Nichol & Dhariwal 2021, eq. 17).

    The end points belong to the other schedules and have no meaning here.
    """
    u = np.arange(num_steps + 1) / num_steps
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


SCHEDULES: Mapping[str, Callable[[int, float, float], Table]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
}


def make_schedule(
    name: str = "linear", num_steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Schedule:
    """The tables of schedule `name` over `num_steps` steps.

    Raises: ConfigError for an unknown name, fewer than 2 steps, or a beta outside (0, 1).
    """
    if name not in SCHEDULES:
        raise ConfigError(f"diffusion.schedule = {name!r}: must be one of {', '.join(SCHEDULES)}")
    if num_steps < 2:
        raise ConfigError(f"diffusion.num_steps = {num_steps}: must be at least 2")
    betas = SCHEDULES[name](num_steps, beta_start, beta_end)
    if not ((betas > 0) & (betas < 1)).all():
        raise ConfigError(
            f"diffusion.num_steps = {num_steps}: the {name} betas reach {betas.max():.4g}, and must stay in (0, 1); "
            "take more steps or a smaller diffusion.beta_end"
        )
    return Schedule(betas, np.cumprod(1 - betas))


def extract(table: Table, t: Int[Array, " batch"], ndim: int) -> Float[Array, "batch *ones"]:
    """table[t] in float32, with axes of size 1 appended up to `ndim`. JAX clamps t outside 0..T-1 to its ends."""
    values = jnp.asarray(table, jnp.float32)[t]
    return values.reshape(values.shape + (1,) * (ndim - 1))
