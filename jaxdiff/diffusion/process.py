"""The forward process q, its posterior, and the reverse process p of a noise prediction."""

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
    variance: Float[Array, "batch *ones"]
    log_variance: Float[Array, "batch *ones"]
    pred_x0: Images


def q_sample(schedule: Schedule, x0: Images, t: Times, eps: Images) -> Images:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (DDPM eq. 4)."""
    abar = schedule.alphas_cumprod
    return extract(np.sqrt(abar), t, x0.ndim) * x0 + extract(np.sqrt(1 - abar), t, x0.ndim) * eps


def predict_x0_from_eps(schedule: Schedule, x: Images, t: Times, eps: Images) -> Images:
    """x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)."""
    abar = schedule.alphas_cumprod
    return extract(np.sqrt(1 / abar), t, x.ndim) * x - extract(np.sqrt(1 / abar - 1), t, x.ndim) * eps


def predict_eps_from_x0(schedule: Schedule, x: Images, t: Times, x0: Images) -> Images:
    """eps = (x_t - sqrt(abar_t) x_0) / sqrt(1 - abar_t)."""
    abar = schedule.alphas_cumprod
    return (x - extract(np.sqrt(abar), t, x.ndim) * x0) * extract(1 / np.sqrt(1 - abar), t, x.ndim)


def q_posterior(schedule: Schedule, x0: Images, x: Images, t: Times) -> Gaussian:
    """q(x_{t-1} | x_t, x_0), its log variance clipped at t = 0 (DDPM eqs. 6 and 7)."""
    s = schedule
    c_x0 = np.sqrt(s.alphas_cumprod_prev) * s.betas / (1 - s.alphas_cumprod)
    c_x = (1 - s.alphas_cumprod_prev) * np.sqrt(1 - s.betas) / (1 - s.alphas_cumprod)
    mean = extract(c_x0, t, x.ndim) * x0 + extract(c_x, t, x.ndim) * x
    variance = extract(s.posterior_variance, t, x.ndim)
    return Gaussian(mean, variance, extract(s.posterior_log_variance_clipped, t, x.ndim))


def p_mean_variance(
    schedule: Schedule, eps: Images, x: Images, t: Times, *, variance: str = "fixed_small", clip: bool = False
) -> Reverse:
    """p(x_{t-1} | x_t) of a noise prediction, x_0 clipped to [-1, 1] if `clip`.

    Args: variance, "fixed_small" (the posterior's) or "fixed_large" (beta, but the posterior's at t = 0).
    Raises: KeyError for another variance.
    """
    small = schedule.posterior_variance
    tables = {
        "fixed_small": (small, schedule.posterior_log_variance_clipped),
        "fixed_large": (large := np.append(small[1], schedule.betas[1:]), np.log(large)),
    }
    pred_x0 = predict_x0_from_eps(schedule, x, t, eps)
    if clip:
        pred_x0 = jnp.clip(pred_x0, min=-1, max=1)
    mean = q_posterior(schedule, pred_x0, x, t).mean
    table, log_table = tables[variance]
    return Reverse(mean, extract(table, t, x.ndim), extract(log_table, t, x.ndim), pred_x0)
