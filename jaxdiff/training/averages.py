"""Averages of the parameters beside `ema`: further decays, and power functions of any width, also after training.

Source: Karras et al. 2024, arXiv 2312.02696 ("EDM2"), section 3 and appendix C. At step t, the power function with
exponent gamma weighs the parameters of step tau with p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1); its width
sigma_rel is the standard deviation of p in units of t. As t grows, the average grows with it, and forgets the start.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from jaxdiff.errors import ConfigError
from jaxdiff.training.optimizer import ema_update

WIDEST = 0.288  # sigma_rel; the mean of all steps, gamma = 0, has 12^(-1/2) = 0.2887
Update = Callable[[Any, Any, Int[Array, ""]], Any]  # (average, parameters, number of updates before this) -> average


def gamma_of(sigma_rel: float) -> float:
    """The exponent, at least 0, of the power function whose width is `sigma_rel`, in (0, 12^(-1/2)].

    The largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.
    """
    a = sigma_rel**-2
    return float(np.roots([1, 7, 16 - a, 12 - a]).real.max())


def sigma_rel_of(gamma: float) -> float:
    """sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))), the width of the power function with this exponent."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def power_update(average: Any, params: Any, step: Int[Array, ""], gamma: float) -> Any:
    """beta average + (1 - beta) params with beta = (1 - 1/t)^(gamma + 1), at update t = `step` + 1.

    The first takes the place of whatever the average was. The weight of step tau is then the integral of p from
    tau - 1 to tau, (tau^(gamma + 1) - (tau - 1)^(gamma + 1)) / t^(gamma + 1).
    """
    t: Float[Array, ""] = step.astype(jnp.float32) + 1
    rate = -jnp.expm1((gamma + 1) * jnp.log1p(-1 / t))  # 1 - beta: float32 has not the digits for 1 - 1/t at large t
    return jax.tree.map(lambda a, p: a + rate * (p - a), average, params)


def updates(config: ConfigDict) -> dict[str, Update]:
    """How each average that the fields `ema_decays` and `ema_sigma_rel` ask for is carried on, by its name."""
    decays = {f"ema:{float(d)}": functools.partial(ema_update, decay=d) for d in config.ema_decays}
    powers = {name: functools.partial(power_update, gamma=gamma_of(s)) for name, s in widths(config).items()}
    return {**decays, **powers}


def widths(config: ConfigDict) -> dict[str, float]:
    """The widths of the power functions that are tracked, by the names of their averages."""
    return {f"sigma_rel:{float(s)}": float(s) for s in config.ema_sigma_rel}


def new_averages(names: Iterable[str], params: Any) -> Any:
    """The averages of step 0, {name: parameters}; () where there are no names."""
    return {name: jax.tree.map(jnp.copy, params) for name in names} or ()


def update_all(averages: Any, params: Any, step: Int[Array, ""], by: Mapping[str, Update]) -> Any:
    """All averages after update number `step` (from 0) led to `params`; () where there are none."""
    return {name: update(averages[name], params, step) for name, update in by.items()} or ()


def parse_weights(weights: str, config: ConfigDict, of: str = "") -> str | float:
    """What `sample.weights` asks for: "ema", "raw" or the name of what is tracked; else the width to reconstruct.

    Args: of, words for whose averages these are. Raises: ConfigError naming what there is.
    """
    there = ("ema", "raw", *updates(config))
    kind, _, number = weights.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = np.nan
    for name in (weights, f"{kind}:{value}"):
        if name in there:
            return name
    if kind == "sigma_rel" and config.ema_sigma_rel and 0 < value <= WIDEST:
        return value
    other = f", sigma_rel:WIDTH with a width in (0, {WIDEST}]" if config.ema_sigma_rel else ""
    raise ConfigError(f"config.sample.weights = {weights!r}: must be one of {', '.join(there)}{other}{of}")


def inner_products(
    steps: Float[np.ndarray, "*a"],
    gammas: Float[np.ndarray, "*a"],
    at: Float[np.ndarray, "*b"],
    by: Float[np.ndarray, "*b"],
) -> Float[np.ndarray, "*c"]:
    """The integral of p q over all steps, of the power functions p at (`steps`, `gammas`) and q at (`at`, `by`).

    (gamma_p + 1) (gamma_q + 1) / (gamma_p + gamma_q + 1) (t_min / t_max)^gamma / t_max, gamma that of the later.
    """
    first, last = np.minimum(steps, at), np.maximum(steps, at)
    later = np.where(steps < at, by, gammas)
    return (gammas + 1) * (by + 1) / (gammas + by + 1) * (first / last) ** later / last


def solve_weights(
    steps: Sequence[int], gammas: Sequence[float], step: int, gamma: float
) -> tuple[Float[np.ndarray, " n"], float]:
    """Weights with which averages at (steps, gammas) add up to what is nearest to that at (step, gamma); and how near.

    Least squares over the profiles, in float64, as in EDM2's appendix C.3. Its weights sum to 1 nearly; here they do so
    exactly, so that parameters that do not move come out as they are. The second value is the norm of the difference
    of the profiles, relative to that of the wanted one.
    """
    t, g, at, by = (np.asarray(x, np.float64) for x in (steps, gammas, step, gamma))
    norms = np.sqrt(inner_products(t, g, t, g))  # in units of which the matrix has ones on its diagonal
    norm = np.sqrt(inner_products(at, by, at, by))
    gram = inner_products(t[:, None], g[:, None], t, g) / norms[:, None] / norms
    wanted = inner_products(t, g, at, by) / norms / norm
    ones = (norm / norms)[:, None]
    bordered = np.block([[gram, ones], [ones.T, np.zeros((1, 1))]])
    x = np.linalg.lstsq(bordered, np.append(wanted, 1.0), rcond=1e-13)[0][:-1]
    error = np.sqrt(max(0.0, 1 - 2 * x @ wanted + x @ gram @ x))
    return x * norm / norms, float(error)


def weighted_sum(weights: Sequence[float], trees: Iterable[Any]) -> Any:
    """Float32, on the host: the sum of w x over weights w and trees x, taken one after the other, in float64."""
    total: list[Any] = []
    for w, tree in zip(weights, trees, strict=True):
        leaves, structure = jax.tree.flatten(tree)
        total = total or [0.0] * len(leaves)
        for k, x in enumerate(leaves):  # leaf by leaf: no second float64 tree
            total[k] = total[k] + w * np.asarray(x, np.float64)
    return jax.tree.unflatten(structure, [np.asarray(x, np.float32) for x in total])
