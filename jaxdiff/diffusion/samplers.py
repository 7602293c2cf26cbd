"""Sampling: step rules (coefficients on the host), one step, and the loop over steps on the device."""

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
    """Coefficients of x' = x0 * pred_x0 + eps * pred_eps + x * x_t + noise * z for every step."""

    x0: Any
    eps: Any
    x: Any
    noise: Any


def ddpm(abar: Table, abar_prev: Table, eta: float) -> Rule:
    """Ancestral sampling of the chain with these abar, posterior variance (DDPM algorithm 2); eta has no part in it."""
    alpha = abar / abar_prev
    beta = 1 - alpha
    x0 = np.sqrt(abar_prev) * beta / (1 - abar)
    x = (1 - abar_prev) * np.sqrt(alpha) / (1 - abar)
    return Rule(x0, np.zeros_like(x0), x, np.sqrt(beta * (1 - abar_prev) / (1 - abar)))


def ddim(abar: Table, abar_prev: Table, eta: float) -> Rule:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eqs. 12 and 16): eta 0 is deterministic, 1 as noisy as ancestral."""
    sigma = eta * np.sqrt((1 - abar_prev) / (1 - abar)) * np.sqrt(1 - abar / abar_prev)
    return Rule(np.sqrt(abar_prev), np.sqrt(1 - abar_prev - sigma**2), np.zeros_like(abar), sigma)


SAMPLERS: Mapping[str, Callable[[Table, Table, float], Rule]] = {"ddim": ddim, "ddpm": ddpm}


class Plan(NamedTuple):
    """All that a sampler does, as arrays over its steps, padded to T: another plan is no other program."""

    num_steps: Int[Array, ""]
    timesteps: Int[Array, " T"]
    signal: Float[Array, " T"]  # sqrt(abar_t)
    sigma: Float[Array, " T"]  # sqrt(1 - abar_t)
    rule: Rule


def make_plan(
    schedule: Schedule, sampler: str = "ddim", *, steps: int = 50, spacing: str = "leading", eta: float = 0.0
) -> Plan:
    """The plan of `sampler` over `steps` of the schedule's timesteps."""
    if sampler not in SAMPLERS:
        raise ConfigError(f"sample.sampler = {sampler!r}: must be one of {', '.join(SAMPLERS)}")
    total = len(schedule.betas)
    t, t_prev = timestep_pairs(spacing, total, steps)
    abar = schedule.alphas_cumprod[t]
    abar_prev = np.append(schedule.alphas_cumprod, 1.0)[t_prev]
    rule = SAMPLERS[sampler](abar, abar_prev, eta)

    def pad(x: Table) -> Float[Array, " T"]:
        return jnp.asarray(np.pad(x, (0, total - steps)), jnp.float32)

    timesteps = jnp.asarray(np.pad(t, (0, total - steps)), jnp.int32)
    return Plan(jnp.int32(steps), timesteps, pad(np.sqrt(abar)), pad(np.sqrt(1 - abar)), Rule(*map(pad, rule)))


def denoise_step(row: Plan, x: Images, eps: Images, z: Images, *, clip: bool) -> tuple[Images, Images]:
    """One step of a plan (a `row` of it, broadcast against x); the next x and the prediction of x_0."""
    x0 = (x - row.sigma * eps) / row.signal
    if clip:
        x0 = jnp.clip(x0, min=-1, max=1)
        eps = (x - row.signal * x0) / row.sigma
    c = row.rule
    return c.x0 * x0 + c.eps * eps + c.x * x + c.noise * z, x0


def _step(model: Model, plan: Plan, keys: PRNGKeyArray, clip: bool, i: Array, x: Images) -> tuple[Images, Images]:
    row = jax.tree.map(lambda table: table[i], plan._replace(num_steps=plan.timesteps))
    eps = model(x, jnp.full(x.shape[:1], row.timesteps))
    draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:], x.dtype))
    z = jax.lax.cond(row.rule.noise > 0, draw, lambda _: jnp.zeros_like(x), keys)
    return denoise_step(row, x, eps, z, clip=clip)


def sample(model: Model, plan: Plan, x_init: Images, keys: PRNGKeyArray, *, clip: bool) -> Images:
    """x after all steps of the plan from x_init, by one device-side loop whose length is traced."""

    def body(i: Array, x: Images) -> Images:
        return _step(model, plan, keys, clip, i, x)[0]

    return jax.lax.fori_loop(0, plan.num_steps, body, x_init)


def sample_keys(key: PRNGKeyArray, indices: Int[Array, " batch"]) -> PRNGKeyArray:
    """One key a sample: sample number k depends on (key, k) alone."""
    return jax.vmap(lambda k: jax.random.fold_in(key, k))(indices)


def initial_noise(keys: PRNGKeyArray, shape: tuple[int, ...]) -> Images:
    """Standard normal x_T of every sample."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 2**31 - 1), shape))(keys)
