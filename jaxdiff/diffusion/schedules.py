"""Noise schedules over discrete steps. A new one is one function here and one line in `SCHEDULES`."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from jaxdiff.diffusion.spacing import timestep_pairs
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

    @property
    def beta_log_variance(self) -> Table:
        """Logarithm of the larger variance: beta, but the posterior's of t = 1 at t = 0 ("fixed_large")."""
        return np.log(np.append(self.posterior_variance[1], self.betas[1:]))

    def levels(self, t: Int[Array, " batch"], ndim: int = 1) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """a = sqrt(abar_t) and s = sqrt(1 - abar_t) of x_t = a x_0 + s eps, with axes of size 1 appended to `ndim`."""
        abar = self.alphas_cumprod
        return extract(np.sqrt(abar), t, ndim), extract(np.sqrt(1 - abar), t, ndim)

    def network_time(self, t: Int[Array, " batch"]) -> Int[Array, " batch"]:
        """What the network is told of t: t itself."""
        return t

    def pairs(self, spacing: str, steps: int) -> tuple[Float64[np.ndarray, "n 3"], Float64[np.ndarray, "n 3"]]:
        """(t, a, s) of the `steps` evaluations of a sampler, and of what each step leads to; errors of `spacing`.

        There t = -1 is the clean end, where a = 1 and s = 0."""
        t, t_prev = timestep_pairs(spacing, len(self.betas), steps)

        def rows(t: Int[np.ndarray, " n"]) -> Float64[np.ndarray, "n 3"]:
            abar = np.append(self.alphas_cumprod, 1.0)[t]
            return np.stack([t, np.sqrt(abar), np.sqrt(1 - abar)], axis=-1)

        return rows(t), rows(t_prev)


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


def shift_noise(alphas_cumprod: Table, shift: float) -> Table:
    """abar with the noise-to-signal ratio s / a multiplied by `shift`: log SNR lowered by 2 log(shift).

    A resolution of d pixels looks like 64 pixels do where shift = d / 64 (Hoogeboom et al. 2023, arXiv 2301.11093).
    """
    return alphas_cumprod / (alphas_cumprod + shift**2 * (1 - alphas_cumprod))


def rescale_to_zero_snr(alphas_cumprod: Table) -> Table:
    """abar with sqrt(abar) shifted and scaled such that the last is 0 and the first is kept.

    Source: Lin et al. 2023 (arXiv 2305.08891), algorithm 1.
    """
    root = np.sqrt(alphas_cumprod)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def from_alphas_cumprod(alphas_cumprod: Table) -> Schedule:
    """The schedule with these abar."""
    return Schedule(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]), alphas_cumprod)


def make_schedule(
    name: str = "linear",
    num_steps: int = 1000,
    *,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    noise_shift: float = 1.0,
    zero_terminal_snr: bool = False,
) -> Schedule:
    """The tables of schedule `name` over `num_steps` steps, changed by `shift_noise` and by `rescale_to_zero_snr`.

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
    schedule = Schedule(betas, np.cumprod(1 - betas))
    if noise_shift != 1:
        schedule = from_alphas_cumprod(shift_noise(schedule.alphas_cumprod, noise_shift))
    if zero_terminal_snr:
        schedule = from_alphas_cumprod(rescale_to_zero_snr(schedule.alphas_cumprod))
    return schedule


def extract(table: Table, t: Int[Array, " batch"], ndim: int) -> Float[Array, "batch *ones"]:
    """table[t] in float32, with axes of size 1 appended up to `ndim`. JAX clamps t outside 0..T-1 to its ends."""
    values = jnp.asarray(table, jnp.float32)[t]
    return values.reshape(values.shape + (1,) * (ndim - 1))
