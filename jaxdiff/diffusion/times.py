"""The times that a loss is taken at. A new distribution is one function here and one line in `TIMES`."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

Unit = Float[Array, " batch"]  # in (0, 1)
HISTORY = 10  # losses that are remembered of a timestep (Nichol & Dhariwal 2021, section 3.3)
UNIFORM_SHARE = 0.001  # of importance sampling


def uniform(u: Unit, mean: float, std: float) -> Float[Array, " batch"]:
    """Uniform in (0, 1); mean and std have no meaning here."""
    return u


def logit_normal(u: Unit, mean: float, std: float) -> Float[Array, " batch"]:
    """In (0, 1), with ln(t / (1 - t)) ~ N(mean, std^2): more in the middle (Esser et al. 2024, arXiv 2403.03206)."""
    return jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u))


def lognormal(u: Unit, mean: float, std: float) -> Float[Array, " batch"]:
    """Positive, with ln(t) ~ N(mean, std^2): EDM's noise levels (Karras et al. 2022, arXiv 2206.00364, table 1)."""
    return jnp.exp(mean + std * jax.scipy.special.ndtri(u))


class Distribution(NamedTuple):
    """quantile: (u in (0, 1), mean, std) -> t. normal: the published mean and std."""

    quantile: Callable[[Unit, float, float], Float[Array, " batch"]]
    normal: tuple[float, float] = (0.0, 1.0)


TIMES: Mapping[str, Distribution] = {
    "uniform": Distribution(uniform),
    "logit_normal": Distribution(logit_normal),
    "lognormal": Distribution(lognormal, (-1.2, 1.2)),
}


def sample_unit(key: PRNGKeyArray, batch: int, *, stratified: bool = False) -> Unit:
    """Numbers uniform in (0, 1); `stratified`: one in each of as many equal parts, at the same place in all of them.

    Each is uniform for itself, but their mean varies less. Source: Kingma et al. 2021 (arXiv 2107.00630), appendix I.1.
    """
    tiny = jnp.finfo(jnp.float32).eps
    if not stratified:
        return jax.random.uniform(key, (batch,), minval=tiny, maxval=1 - tiny)
    u = (jax.random.uniform(key, ()) + jnp.arange(batch) / batch) % 1
    return jnp.clip(u, tiny, 1 - tiny)


def sample_timesteps(
    key: PRNGKeyArray, batch: int, num_steps: int, *, stratified: bool = False
) -> Int[Array, " batch"]:
    """Timesteps uniform in 0..num_steps-1, `stratified` as in `sample_unit`."""
    if not stratified:
        return jax.random.randint(key, (batch,), 0, num_steps)
    u = sample_unit(key, batch, stratified=True)
    return jnp.minimum((u * num_steps).astype(jnp.int32), num_steps - 1)


class LossHistory(NamedTuple):
    """The last losses of every timestep, in a ring: so many as `seen` were ever put there."""

    losses: Float[Array, "T history"]
    seen: Int[Array, " T"]


def new_history(num_steps: int) -> LossHistory:
    """An empty history."""
    return LossHistory(jnp.zeros((num_steps, HISTORY)), jnp.zeros(num_steps, jnp.int32))


def remember(history: LossHistory, t: Int[Array, " batch"], loss: Float[Array, " batch"]) -> LossHistory:
    """The history with the losses at timesteps t, which may occur several times, put into it in their order."""
    batch = len(t)
    order = jnp.argsort(t, stable=True)
    ordered = t[order]
    place = jnp.arange(batch)
    rank = place - jnp.searchsorted(ordered, ordered)  # how often the timestep stands before this one
    times = jnp.searchsorted(ordered, ordered, side="right") - jnp.searchsorted(ordered, ordered)
    slot = (history.seen[ordered] + rank) % HISTORY
    slot = jnp.where(rank >= times - HISTORY, slot, HISTORY)  # older than the last ones: out of bounds, dropped
    losses = history.losses.at[ordered, slot].set(loss[order].astype(jnp.float32), mode="drop")
    return LossHistory(losses, history.seen.at[t].add(1))


def importance_probabilities(history: LossHistory) -> Float[Array, " T"]:
    """p_t ~ sqrt(E[L_t^2]), mixed with a small uniform share; uniform until every timestep has its full history.

    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 18.
    """
    num_steps = len(history.seen)
    p = jnp.sqrt(jnp.square(history.losses).mean(axis=-1))
    p = (1 - UNIFORM_SHARE) * p / jnp.maximum(p.sum(), 1e-30) + UNIFORM_SHARE / num_steps
    return jnp.where((history.seen >= HISTORY).all(), p, jnp.full_like(p, 1 / num_steps))


def sample_important(
    key: PRNGKeyArray, batch: int, history: LossHistory, *, stratified: bool = False
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
    """Timesteps of the probabilities p_t, and the weights 1 / (T p_t) that keep the expected loss what it was."""
    p = importance_probabilities(history)
    num_steps = len(p)
    u = sample_unit(key, batch, stratified=stratified)
    t = jnp.minimum(jnp.searchsorted(jnp.cumsum(p), u), num_steps - 1)
    return t, 1 / (num_steps * p[t])
