"""The variational bound in bits per dimension: its terms, the prior's, and the variance that a network learns."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdiff.diffusion.process import Gaussian, p_mean_variance, q_posterior, q_sample
from jaxdiff.diffusion.schedules import Schedule

Images = Float[Array, "batch *shape"]
Times = Int[Array, " batch"]
HALF_BIN = 1 / 255  # of 8-bit values in [-1, 1]


def normal_kl(p: Gaussian, q: Gaussian) -> Images:
    """KL(p | q) of every element, in nats, of their means and log variances."""
    return 0.5 * (
        q.log_variance
        - p.log_variance
        + jnp.exp(p.log_variance - q.log_variance)
        + jnp.square(p.mean - q.mean) * jnp.exp(-q.log_variance)
        - 1
    )


def discretised_log_likelihood(x: Images, p: Gaussian) -> Images:
    """log of the mass that p gives to the bin of each 8-bit value x in [-1, 1], in nats; the outer bins are open.

    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 13; there, as here, with the normal distribution's tanh approximation
    and masses of at least 1e-12.
    """

    def cdf(z: Images) -> Images:  # (1 + tanh(u)) / 2 in a form that keeps its digits where it is small
        return jax.nn.sigmoid(2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))

    centred, scale = x - p.mean, jnp.exp(-0.5 * p.log_variance)
    above, below = scale * (centred + HALF_BIN), scale * (centred - HALF_BIN)
    # Of a bin in the upper half the mirror image, for the same reason.
    between = jnp.where(centred > 0, cdf(-below) - cdf(-above), cdf(above) - cdf(below))
    mass = jnp.where(x < -0.999, cdf(above), jnp.where(x > 0.999, cdf(-below), between))
    return jnp.log(jnp.maximum(mass, 1e-12))


def _bits_per_dim(nats: Images) -> Float[Array, " batch"]:
    return nats.mean(axis=tuple(range(1, nats.ndim))) / np.log(2)


def vlb_term(
    schedule: Schedule,
    x0: Images,
    x: Images,
    t: Times,
    pred_x0: Images,
    fraction: Images | None = None,
    *,
    discrete: bool,
    variance: str = "fixed_small",
    clip: bool = False,
) -> Float[Array, " batch"]:
    """L_t of the bound, in bits per dimension: KL(q(x_{t-1} | x_t, x_0) | p), and at t = 0 -log p(x_0 | x_1).

    Args: variance, fraction, clip, of `p_mean_variance`.
      discrete: whether x_0 are 8-bit values; else, as for latents, the KL stands at t = 0 too, with the posterior's
      clipped variance.
    Source: Ho et al. 2020, eq. 5.
    """
    reverse = p_mean_variance(schedule, pred_x0, x, t, variance=variance, fraction=fraction, clip=clip)
    p = Gaussian(reverse.mean, reverse.variance, reverse.log_variance)
    kl = _bits_per_dim(normal_kl(q_posterior(schedule, x0, x, t), p))
    if not discrete:
        return kl
    return jnp.where(t == 0, _bits_per_dim(-discretised_log_likelihood(x0, p)), kl)


def prior_bits(schedule: Schedule, x0: Images) -> Float[Array, " batch"]:
    """L_T = KL(q(x_T | x_0) | N(0, 1)), in bits per dimension."""
    abar = schedule.alphas_cumprod[-1]
    # 1 - abar - 1 - log(1 - abar), which is small: in float64.
    return _bits_per_dim(0.5 * (abar * jnp.square(x0) + (-abar - np.log1p(-abar))))


class Likelihood(NamedTuple):
    """Bits per dimension: of the bound, which the prior's are a part of, and of its terms t = 0..T-1."""

    total: Float[Array, " batch"]
    prior: Float[Array, " batch"]
    terms: Float[Array, "T batch"]


def likelihood_bound(
    schedule: Schedule,
    model: Callable[[Images, Times], tuple[Images, Images | None]],
    x0: Images,
    noise: Callable[[Int[Array, ""]], Images],
    *,
    discrete: bool,
    clip: bool = False,
) -> Likelihood:
    """The bound on -log p(x_0) by all T terms, each at one draw of x_t; one loop on the device.

    Args: model(x, t) -> (prediction of x_0, fraction or None); noise(t): standard normal of the shape of x_0; others as
      in `vlb_term`.
    """

    def term(_: None, t: Int[Array, ""]) -> tuple[None, Float[Array, " batch"]]:
        times = jnp.full(x0.shape[:1], t)
        x = q_sample(schedule, x0, times, noise(t))
        pred_x0, fraction = model(x, times)
        return None, vlb_term(schedule, x0, x, times, pred_x0, fraction, discrete=discrete, clip=clip)

    terms = jax.lax.scan(term, None, jnp.arange(len(schedule.betas)))[1]
    prior = prior_bits(schedule, x0)
    return Likelihood(terms.sum(axis=0) + prior, prior, terms)
