"""Forward processes in continuous time, with the methods of `schedules.Schedule`: EDM's, and flow matching's."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from jaxdiff.errors import ConfigError

Times = Float[Array, " batch"]
Levels = Float[Array, "batch *ones"]
Rows = Float64[np.ndarray, "n 3"]


def _append_axes(t: Times, ndim: int) -> Levels:
    return t.reshape(t.shape + (1,) * (ndim - 1))


def _check_spacing(spacing: str, allowed: str, steps: int, schedule: str) -> None:
    if spacing != allowed:
        raise ConfigError(f"sample.spacing = {spacing!r}: must be {allowed} with diffusion.schedule = {schedule!r}")
    if steps < 1:
        raise ConfigError(f"sample.steps = {steps}: must be at least 1")


class Edm(NamedTuple):
    """x = x_0 + sigma eps, whose time is sigma itself (Karras et al. 2022, arXiv 2206.00364, table 1).

    A sampler goes from sigma_max to sigma_min by steps that are even in sigma^(1 / rho), and then to 0 (eq. 5).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def levels(self, t: Times, ndim: int = 1) -> tuple[Levels, Levels]:
        """a = 1 and s = sigma, with axes of size 1 appended to `ndim`."""
        t = _append_axes(t, ndim)
        return jnp.ones_like(t), t

    def network_time(self, t: Times) -> Times:
        """250 ln(sigma): the paper's c_noise = ln(sigma) / 4, in steps as fine as those of 1000 timesteps."""
        return 250 * jnp.log(t)

    def pairs(self, spacing: str, steps: int) -> tuple[Rows, Rows]:
        """(t, a, s) of the `steps` evaluations, and of what each step leads to.

        Raises: ConfigError for a spacing other than "karras".
        """
        _check_spacing(spacing, "karras", steps, "edm")
        i = np.arange(steps) / max(steps - 1, 1)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigma = np.append((high + i * (low - high)) ** self.rho, 0.0)
        rows = np.stack([sigma, np.ones_like(sigma), sigma], axis=-1)
        return rows[:-1], rows[1:]


class Flow(NamedTuple):
    """x = (1 - t) x_0 + t eps for t in [0, 1]: straight lines from image to noise.

    Where `noise_shift` is not 1, t' = shift t / (1 + (shift - 1) t) stands in the place of t: the ratio of noise to
    signal is multiplied by the shift, as higher resolutions need. Source: Liu et al. 2022 (arXiv 2209.03003), Esser et
    al. 2024 (arXiv 2403.03206), eq. 23.
    """

    noise_shift: float = 1.0

    def _shifted(self, t: Any) -> Any:
        return self.noise_shift * t / (1 + (self.noise_shift - 1) * t)

    def levels(self, t: Times, ndim: int = 1) -> tuple[Levels, Levels]:
        """a = 1 - t' and s = t' of the shifted t', with axes of size 1 appended to `ndim`."""
        t = _append_axes(self._shifted(t), ndim)
        return 1 - t, t

    def network_time(self, t: Times) -> Times:
        """1000 t': in the range of 1000 timesteps."""
        return 1000 * self._shifted(t)

    def pairs(self, spacing: str, steps: int) -> tuple[Rows, Rows]:
        """(t, a, s) of the `steps` evaluations from t = 1, and of what each step leads to; the last to t = 0.

        Raises: ConfigError for a spacing other than "even".
        """
        _check_spacing(spacing, "even", steps, "flow")
        t = 1 - np.arange(steps + 1) / steps
        shifted = self._shifted(t)
        rows = np.stack([t, 1 - shifted, shifted], axis=-1)
        return rows[:-1], rows[1:]
