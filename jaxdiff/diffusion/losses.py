"""The squared error of a prediction, and its weights. A new weighting is one function and one line in `WEIGHTINGS`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.diffusion.predictions import PREDICTIONS, Target

Level = Any


def squared_error(
    prediction: Float[Array, "batch *shape"], target: Float[Array, "batch *shape"]
) -> Float[Array, " batch"]:
    """Mean squared error of each sample, in float32: L_simple (DDPM eq. 14)."""
    error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    return error.mean(axis=tuple(range(1, error.ndim)))


def min_snr(a: Level, s: Level, gamma: float) -> Level:
    """min(snr, gamma) on x_0, with snr = a^2 / s^2 (Hang et al. 2023, arXiv 2303.09556, eq. 7; gamma = 5)."""
    return jnp.minimum(a**2 / s**2, gamma)


def p2(a: Level, s: Level, gamma: float) -> Level:
    """snr / (1 + snr)^gamma on x_0: 1 / (1 + snr)^gamma on eps (Choi et al. 2022, arXiv 2204.00227, eq. 8, k = 1)."""
    snr = a**2 / s**2
    return snr / (1 + snr) ** gamma


def edm(a: Level, s: Level, gamma: float) -> Level:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x_0, with gamma for sigma_data (Karras et al. 2022, table 1).

    It is 1 on what the EDM parameterisation predicts.
    """
    return (s**2 + (gamma * a) ** 2) / (s * gamma) ** 2


class Weighting(NamedTuple):
    """on_x0: (a, s, gamma) -> weight of the squared error of x_0; None: 1 on what is predicted. predictions: those
    that it is defined for. gamma: the published one; None: sigma_data takes its place."""

    on_x0: Callable[[Level, Level, float], Level] | None
    predictions: tuple[str, ...]
    gamma: float | None = 0.0


WEIGHTINGS: Mapping[str, Weighting] = {
    "simple": Weighting(None, tuple(PREDICTIONS)),
    "min_snr": Weighting(min_snr, ("eps", "x0", "v"), 5.0),
    "p2": Weighting(p2, ("eps", "x0", "v"), 1.0),
    "edm": Weighting(edm, ("x0", "edm"), None),
}


def weight_of(weighting: str, target: Target, a: Level, s: Level, gamma: float) -> Level:
    """The weight of the squared error of a prediction F = p x_0 + q eps, of which an error of x_0 is s / (a q - s p).

    Raises: KeyError for an unknown weighting.
    """
    on_x0 = WEIGHTINGS[weighting].on_x0
    if on_x0 is None:
        return jnp.ones_like(a)
    return on_x0(a, s, gamma) * (s / (a * target.eps - s * target.x0)) ** 2
