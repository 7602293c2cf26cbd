"""The forward process q over discrete steps, its posterior, and the reverse process p of a prediction."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdiff.diffusion.schedules import Schedule, extract

Images = Float[Array, "batch *shape"]
Times = Int[Array, " batch"]


class Gaussian(NamedTuple):
    """Mean, variance and log variance, the latter two with axes of size 1 after the batch."""

    mean: Images
    variance: Float[Array, "batch *ones"]
    log_variance: Float[Array, "batch *ones"]


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t), and the prediction of x_0 that it comes from."""

    mean: Images
    variance: Images
    log_variance: Images
    pred_x0: Images


def q_sample(schedule: Schedule, x0: Images, t: Times, eps: Images) -> Images:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (DDPM eq. 4)."""
    abar = schedule.alphas_cumprod
    return extract(np.sqrt(abar), t, x0.ndim) * x0 + extract(np.sqrt(1 - abar), t, x0.ndim) * eps


def q_posterior(schedule: Schedule, x0: Images, x: Images, t: Times) -> Gaussian:
    """q(x_{t-1} | x_t, x_0), its log variance clipped at t = 0 (DDPM eqs. 6 and 7)."""
    s = schedule
    c_x0 = np.sqrt(s.alphas_cumprod_prev) * s.betas / (1 - s.alphas_cumprod)
    c_x = (1 - s.alphas_cumprod_prev) * np.sqrt(1 - s.betas) / (1 - s.alphas_cumprod)
    mean = extract(c_x0, t, x.ndim) * x0 + extract(c_x, t, x.ndim) * x
    variance = extract(s.posterior_variance, t, x.ndim)
    return Gaussian(mean, variance, extract(s.posterior_log_variance_clipped, t, x.ndim))


def learned_fraction(output: Images) -> Images:
    """The share (v + 1) / 2 of the larger log variance, from what a network says beside its prediction."""
    return (output + 1) / 2


def p_mean_variance(
    schedule: Schedule,
    pred_x0: Images,
    x: Images,
    t: Times,
    *,
    variance: str = "fixed_small",
    fraction: Images | None = None,
    clip: bool = False,
) -> Reverse:
    """p(x_{t-1} | x_t) of a prediction of x_0, which is clipped to [-1, 1] if `clip`.

    Args: variance, "fixed_small" (the posterior's) or "fixed_large" (beta, but the posterior's at t = 0). fraction:
      where it is given, the log variance is fraction log(beta) + (1 - fraction) log(posterior variance), elementwise.
    Raises: KeyError for another variance. Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 15.
    """
    if clip:
        pred_x0 = jnp.clip(pred_x0, min=-1, max=1)
    mean = q_posterior(schedule, pred_x0, x, t).mean
    small = extract(schedule.posterior_log_variance_clipped, t, x.ndim)
    if fraction is not None:
        log_variance = fraction * extract(np.log(schedule.betas), t, x.ndim) + (1 - fraction) * small
        return Reverse(mean, jnp.exp(log_variance), log_variance, pred_x0)
    tables = {
        "fixed_small": (schedule.posterior_variance, schedule.posterior_log_variance_clipped),
        "fixed_large": (np.exp(schedule.beta_log_variance), schedule.beta_log_variance),
    }
    table, log_table = tables[variance]
    return Reverse(mean, extract(table, t, x.ndim), extract(log_table, t, x.ndim), pred_x0)
