"""Training losses and the timesteps they are taken at."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def sample_timesteps(key: PRNGKeyArray, batch: int, num_steps: int) -> Int[Array, " batch"]:
    """Timesteps uniform in 0..num_steps-1."""
    return jax.random.randint(key, (batch,), 0, num_steps)


def simple_loss(
    prediction: Float[Array, "batch *shape"], target: Float[Array, "batch *shape"]
) -> Float[Array, " batch"]:
    """Mean squared error of each sample, in float32: L_simple (DDPM eq. 14)."""
    error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    return error.mean(axis=tuple(range(1, error.ndim)))
