"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Images = Float[Array, "batch *shape"]
Times = Int[Array, " batch"]
Labels = Int[Array, " batch"]
Weights = Float[Array, ""] | Float[Array, " batch"]


def guide(cond: Images, uncond: Images, w: Weights) -> Images:
    """(1 + w) cond - w uncond (eq. 6). Elsewhere the weight is called s = 1 + w; w = 0 is no guidance."""
    w = jnp.asarray(w)
    w = w.reshape(w.shape + (1,) * (cond.ndim - w.ndim))
    return (1 + w) * cond - w * uncond


def classifier_free(
    apply: Callable[[Images, Times, Labels], Images], null_label: int
) -> Callable[[Images, Times, Labels, Weights], Images]:
    """From apply(x, t, y) the guided model(x, t, y, w), which calls it once, on a batch of twice the size."""

    def model(x: Images, t: Times, y: Labels, w: Weights) -> Images:
        labels = jnp.concatenate([y, jnp.full_like(y, null_label)])
        cond, uncond = jnp.split(apply(jnp.concatenate([x, x]), jnp.concatenate([t, t]), labels), 2)
        return guide(cond, uncond, w)

    return model
