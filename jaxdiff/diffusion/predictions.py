"""What a network predicts. A new quantity is one function here and one line in `PREDICTIONS`.

With x = a x_0 + s eps a network predicts F = p x_0 + q eps; p and q are functions of (a, s), and with x they give back
x_0 and eps. That is all there is to a parameterisation, but for the scale of the network's input.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

Images = Float[Array, "batch *shape"]
Level = Any  # a number, or an array on host or device that broadcasts against images


class Target(NamedTuple):
    """The predicted quantity as x0 * x_0 + eps * eps."""

    x0: Level
    eps: Level


class Prediction(NamedTuple):
    """target: (a, s, sigma_data) -> Target. input_scale: the same -> factor of x before the network."""

    target: Callable[[Level, Level, float], Target]
    input_scale: Callable[[Level, Level, float], Level] = lambda a, s, sigma_data: 0 * a + 1


def eps(a: Level, s: Level, sigma_data: float) -> Target:
    """The noise (Ho et al. 2020, arXiv 2006.11239)."""
    return Target(0 * a, 0 * a + 1)


def x0(a: Level, s: Level, sigma_data: float) -> Target:
    """The clean image."""
    return Target(0 * a + 1, 0 * a)


def v(a: Level, s: Level, sigma_data: float) -> Target:
    """a eps - s x_0, the velocity on the circle a^2 + s^2 = 1 (Salimans & Ho 2022, arXiv 2202.00512)."""
    return Target(-s, a)


def flow(a: Level, s: Level, sigma_data: float) -> Target:
    """eps - x_0, the velocity on the straight line (Liu et al. 2022, arXiv 2209.03003)."""
    return Target(0 * a - 1, 0 * a + 1)


def edm(a: Level, s: Level, sigma_data: float) -> Target:
    """(x_0 - c_skip x) / c_out of x = x_0 + sigma eps with sigma = s / a (Karras et al. 2022, table 1).

    Of unit variance where x_0 has the deviation sigma_data. With sigma_data = 1 and a^2 + s^2 = 1 it is -v.
    """
    size = _root(s**2 + (sigma_data * a) ** 2)
    return Target(s / (sigma_data * size), -sigma_data * a / size)


def edm_input_scale(a: Level, s: Level, sigma_data: float) -> Level:
    """1 / sqrt(s^2 + (a sigma_data)^2): inputs of unit variance (c_in)."""
    return 1 / _root(s**2 + (sigma_data * a) ** 2)


def _root(x: Level) -> Level:
    return x**0.5 if not isinstance(x, np.ndarray) else np.sqrt(x)


PREDICTIONS: Mapping[str, Prediction] = {
    "eps": Prediction(eps),
    "x0": Prediction(x0),
    "v": Prediction(v),
    "flow": Prediction(flow),
    "edm": Prediction(edm, edm_input_scale),
}


def to_target(target: Target, x0: Images, eps: Images) -> Images:
    """F of an image and its noise."""
    return target.x0 * x0 + target.eps * eps


def to_x0(target: Target, a: Level, s: Level, x: Images, prediction: Images) -> Images:
    """x_0 = (q x - s F) / (a q - s p)."""
    det = a * target.eps - s * target.x0
    return target.eps / det * x - s / det * prediction


def to_eps(target: Target, a: Level, s: Level, x: Images, prediction: Images) -> Images:
    """eps = (a F - p x) / (a q - s p)."""
    det = a * target.eps - s * target.x0
    return a / det * prediction - target.x0 / det * x
