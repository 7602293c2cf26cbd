"""AdamW with gradient clipping and cosine annealing, and the moving average of the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict


def lr_schedule(lr: float, total_steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Step -> learning rate: linear from 0 over `warmup_steps`, then half a cosine from `lr` to 0 at `total_steps`."""
    cosine = optax.cosine_decay_schedule(lr, max(1, total_steps - warmup_steps))
    if not warmup_steps:
        return cosine
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup_steps), cosine], [warmup_steps])


def total_steps(config: ConfigDict, num_images: int) -> int:
    """Optimiser steps of a stage: `config.steps`, or those of `config.epochs` passes over `num_images`."""
    return config.steps or max(1, round(config.epochs * num_images / config.batch_size))


def make_optimizer(
    schedule: optax.Schedule, weight_decay: float, clip_norm: float, betas: tuple[float, float] = (0.9, 0.999)
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) on gradients whose global norm is clipped; the decay is on all parameters."""
    adamw = optax.adamw(schedule, *betas, weight_decay=weight_decay)
    return optax.chain(clip_by_global_norm(clip_norm), adamw)


def global_norm(tree: Any) -> Float[Array, ""]:
    """Root of the sum of all squares, of which a vector is left of each array, to be added up in one go.

    On a GPU a sum to a number is two kernels, which for 300 arrays take longer than to read them. The barrier keeps XLA
    from summing each array by itself.
    """

    def partial(x: Array) -> Float[Array, " n"]:
        # What is left of a convolution's kernel are its features, which are `step.formats`' first.
        axes = (0, 1, 2) if x.ndim == 4 else range(1, x.ndim)
        return jnp.atleast_1d(jnp.square(x).sum(axes))

    partials = jnp.concatenate([partial(x) for x in jax.tree.leaves(tree)])
    return jnp.sqrt(jax.lax.optimization_barrier(partials).sum())


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm by the `global_norm` here."""

    def clip(updates: Any, _: Any) -> Any:
        norm = global_norm(updates)
        return jax.tree.map(lambda x: jnp.where(norm < largest, x, x / norm * largest), updates)

    return optax.stateless(clip)


def recipe_optimizer(config: ConfigDict, total: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser, and its learning rate by step, of the fields of `fields.recipe()` over `total` steps."""
    schedule = lr_schedule(config.lr, total, config.warmup_steps)
    return make_optimizer(schedule, config.weight_decay, config.clip_norm, tuple(config.adam_betas)), schedule


def ema_update(ema: Any, params: Any, step: Int[Array, ""], decay: float) -> Any:
    """ema + (1 - d)(params - ema) with d = min(decay, (1 + n) / (10 + n)) after update number n = `step`.

    The warm-up keeps the average from remembering the initialisation.
    """
    n: Float[Array, ""] = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda e, p: e + (1 - d) * (p - e), ema, params)
