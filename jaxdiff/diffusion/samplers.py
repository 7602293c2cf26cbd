"""Sampling: step rules (coefficients, on the host), one step, and the loop over the steps (on the device)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, PRNGKeyArray

from jaxdiff.diffusion.schedules import Schedule
from jaxdiff.diffusion.spacing import timestep_pairs
from jaxdiff.errors import ConfigError

Images = Float[Array, "batch *shape"]
Table = Float64[np.ndarray, " n"]
Model = Callable[[Images, Int[Array, " batch"]], Images]


class Rule(NamedTuple):
    """Coefficients of x' = x0 * pred_x0 + eps * pred_eps + x * x_t + noise * z, one of each for every step."""

    x0: Any
    eps: Any
    x: Any
    noise: Any


def ddpm(abar: Table, abar_prev: Table, eta: float = 0.0) -> Rule:
    """Ancestral sampling with the posterior's variance, beta_i = 1 - abar / abar_prev (DDPM eq. 7, algorithm 2)."""
    alpha = abar / abar_prev
    x0 = np.sqrt(abar_prev) * (1 - alpha) / (1 - abar)
    x = (1 - abar_prev) * np.sqrt(alpha) / (1 - abar)
    return Rule(x0, np.zeros_like(x0), x, np.sqrt((1 - alpha) * (1 - abar_prev) / (1 - abar)))


def ddpm_large(abar: Table, abar_prev: Table, eta: float = 0.0) -> Rule:
    """Ancestral sampling with the larger variance, beta_i; noiseless, as all of them, in the step to abar_prev = 1."""
    return ddpm(abar, abar_prev)._replace(noise=np.sqrt(1 - abar / abar_prev) * (abar_prev < 1))


def ddim(abar: Table, abar_prev: Table, eta: float = 0.0) -> Rule:
    """DDIM (arXiv 2010.02502, eqs. 12 and 16): eta = 0 is deterministic, 1 as noisy as `ddpm`."""
    sigma = eta * np.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
    return Rule(np.sqrt(abar_prev), np.sqrt(1 - abar_prev - sigma**2), np.zeros_like(abar), sigma)


SAMPLERS: Mapping[str, Callable[[Table, Table, float], Rule]] = {"ddim": ddim, "ddpm": ddpm, "ddpm_large": ddpm_large}
WITH_ETA = ("ddim",)


class Plan(NamedTuple):
    """What a sampler does, as arrays over its steps that are padded to T: no two plans need two programs."""

    num_steps: Int[Array, ""]
    timesteps: Int[Array, " T"]
    signal: Float[Array, " T"]  # sqrt(abar_t)
    sigma: Float[Array, " T"]  # sqrt(1 - abar_t)
    rule: Rule


def make_plan(
    schedule: Schedule, sampler: str = "ddim", *, steps: int = 50, spacing: str = "leading", eta: float = 0.0
) -> Plan:
    """The plan of `sampler` for `steps` timesteps of the schedule, its coefficients computed in float64.

    Raises: ConfigError for an unknown sampler or spacing, too many steps, or an eta outside [0, 1] or not used.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sample.sampler = {sampler!r}: must be one of {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1 or (eta and sampler not in WITH_ETA):
        raise ConfigError(f"sample.eta = {eta}: must be in [0, 1] for {', '.join(WITH_ETA)}, 0 for other samplers")
    total = len(schedule.betas)
    t, t_prev = timestep_pairs(spacing, total, steps)
    abar = schedule.alphas_cumprod[t]
    abar_prev = np.append(schedule.alphas_cumprod, 1.0)[t_prev]  # index -1 is the clean end

    def pad(x: Table) -> Float[Array, " T"]:
        return jnp.asarray(np.pad(x, (0, total - steps)), jnp.float32)

    rule = Rule(*map(pad, SAMPLERS[sampler](abar, abar_prev, eta)))
    timesteps = jnp.asarray(np.pad(t, (0, total - steps)), jnp.int32)
    return Plan(jnp.asarray(steps, jnp.int32), timesteps, pad(np.sqrt(abar)), pad(np.sqrt(1 - abar)), rule)


def plan_row(plan: Plan, i: Int[Array, "*index"], ndim: int = 0) -> Plan:
    """The tables of a plan at step(s) i, with axes of size 1 appended up to `ndim`; num_steps is left as it is."""

    def at(table: Array) -> Array:
        row = table[i]
        return row.reshape(row.shape + (1,) * max(0, ndim - row.ndim)) if row.ndim else row

    return jax.tree.map(at, plan._replace(num_steps=plan.timesteps))._replace(num_steps=plan.num_steps)


def denoise_step(
    row: Plan, x: Images, eps: Images, z: Images, *, clip: bool, recompute_eps: bool = True
) -> tuple[Images, Images]:
    """One step: the next x, and the prediction of x_0.

    Args:
      row: of a plan, broadcast against x. eps: predicted noise. z: standard normal.
      clip: the prediction of x_0 to [-1, 1]; then eps is recomputed from it (guided-diffusion), unless
        `recompute_eps` is False (diffusers' default).
    """
    x0 = (x - row.sigma * eps) / row.signal
    if clip:
        x0 = jnp.clip(x0, min=-1, max=1)
        if recompute_eps:
            eps = (x - row.signal * x0) / row.sigma
    c = row.rule
    return c.x0 * x0 + c.eps * eps + c.x * x + c.noise * z, x0


def _step(
    model: Model, plan: Plan, keys: PRNGKeyArray, clip: bool, recompute_eps: bool, i: Array, x: Images
) -> tuple[Images, Images]:
    row = plan_row(plan, i)
    eps = model(x, jnp.full(x.shape[:1], row.timesteps))

    def draw(keys: PRNGKeyArray) -> Images:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:], x.dtype))(keys)

    # Deterministic samplers, and every sampler's last step, draw nothing.
    z = jax.lax.cond(row.rule.noise > 0, draw, lambda keys: jnp.zeros_like(x), keys)
    return denoise_step(row, x, eps, z, clip=clip, recompute_eps=recompute_eps)


def sample(
    model: Model, plan: Plan, x_init: Images, keys: PRNGKeyArray, *, clip: bool, recompute_eps: bool = True
) -> Images:
    """x after all steps of the plan, from x_init: one loop on the device, whose length is traced.

    Args: model(x, t) -> eps; keys, one a sample (`sample_keys`); clip, recompute_eps as in `denoise_step`.
    """

    def body(i: Array, x: Images) -> Images:
        return _step(model, plan, keys, clip, recompute_eps, i, x)[0]

    return jax.lax.fori_loop(0, plan.num_steps, body, x_init)


def trajectory(
    model: Model,
    plan: Plan,
    x_init: Images,
    keys: PRNGKeyArray,
    *,
    num_steps: int,
    clip: bool,
    recompute_eps: bool = True,
) -> tuple[Float[Array, "n batch *shape"], Float[Array, "n batch *shape"]]:
    """All x and all predictions of x_0 over the first `num_steps` steps, by `lax.scan`; arguments as in `sample`."""

    def body(x: Images, i: Array) -> tuple[Images, tuple[Images, Images]]:
        x, x0 = _step(model, plan, keys, clip, recompute_eps, i, x)
        return x, (x, x0)

    return jax.lax.scan(body, x_init, jnp.arange(num_steps))[1]


def sample_keys(key: PRNGKeyArray, indices: Int[Array, " batch"]) -> PRNGKeyArray:
    """One key a sample: all the randomness of sample number k depends on (key, k) alone."""
    return jax.vmap(lambda k: jax.random.fold_in(key, k))(indices)


def initial_noise(keys: PRNGKeyArray, shape: tuple[int, ...]) -> Images:
    """Standard normal x_T of every sample, [B, *shape]."""
    beyond_all_steps = 2**31 - 1
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, beyond_all_steps), shape))(keys)
