"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), and guidance by a weaker model."""

from collections.abc import Callable

import jax
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


def rescale(guided: Images, cond: Images, phi: Float[Array, ""] | float) -> Images:
    """`guided` with its standard deviation per sample brought towards that of `cond`, by the share phi in [0, 1].

    phi guided std(cond) / std(guided) + (1 - phi) guided; 0 = unchanged, 0.7 in the paper.
    Source: Lin et al. 2023 (arXiv 2305.08891), eqs. 15 and 16.
    """
    axes = tuple(range(1, cond.ndim))
    spread = guided.std(axis=axes, keepdims=True)
    # A network that has learnt nothing yet predicts zero: there is nothing to rescale, and 0 / 0 would spread.
    ratio = jnp.where(spread > 0, cond.std(axis=axes, keepdims=True) / jnp.where(spread > 0, spread, 1), 1)
    return guided * (phi * ratio + (1 - phi))


def classifier_free(
    apply: Callable[[Images, Times, Labels], Images], null_label: int, *, phi: Float[Array, ""] | float = 0.0
) -> Callable[[Images, Times, Labels, Weights], Images]:
    """From apply(x, t, y) the guided model(x, t, y, w), which calls it once, on a batch of twice the size.

    Args: phi, of `rescale`.
    """

    def model(x: Images, t: Times, y: Labels, w: Weights) -> Images:
        labels = jnp.concatenate([y, jnp.full_like(y, null_label)])
        cond, uncond = jnp.split(apply(jnp.concatenate([x, x]), jnp.concatenate([t, t]), labels), 2)
        return rescale(guide(cond, uncond, w), cond, phi)

    return model


def autoguided(
    apply: Callable[[Images, Times, Labels], Images],
    weak: Callable[[Images, Times, Labels], Images],
    *,
    phi: Float[Array, ""] | float = 0.0,
) -> Callable[[Images, Times, Labels, Weights], Images]:
    """From apply(x, t, y) and that of a `weak` model the model(x, t, y, w) that is guided away from the weak one.

    weak + (1 + w) (apply - weak): `guide` with a weaker conditional prediction in the place of the unconditional one.
    As the weights sum to 1, the same holds for eps as for the denoised images D of the paper, which writes w for 1 + w.
    Args: phi, of `rescale`.
    Source: Karras et al. 2024 (arXiv 2406.02507), D_w = w D_1 + (1 - w) D_0 with a weak model for D_0.
    """

    def model(x: Images, t: Times, y: Labels, w: Weights) -> Images:
        main = apply(x, t, y)
        return rescale(guide(main, weak(x, t, y), w), main, phi)

    return model


def within(
    interval: tuple[Int[Array, ""] | int, Int[Array, ""] | int],
    guided: Callable[[Images, Times], Images],
    plain: Callable[[Images, Times], Images],
) -> Callable[[Images, Times], Images]:
    """The model(x, t) that is `guided` where low <= t <= high, and `plain` elsewhere, where `guided` is not computed.

    Args: interval, (low, high) in timesteps. t must be the same in the whole batch, as it is in a sampler.
    Source: Kynkaanniemi et al. 2024 (arXiv 2404.07724), there in sigma.
    """
    low, high = interval

    def model(x: Images, t: Times) -> Images:
        return jax.lax.cond((low <= t[0]) & (t[0] <= high), guided, plain, x, t)

    return model
