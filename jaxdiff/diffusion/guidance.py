"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), and guidance by a weaker model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.diffusion.loop import Output

Images = Float[Array, "batch *shape"]
Times = Int[Array, " batch"] | Float[Array, " batch"]
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


Predicted = Images | Output  # a learned variance beside the prediction is not guided: it stays the conditional one's
Apply = Callable[[Images, Times, Labels], Predicted]


def _guided(cond: Predicted, uncond: Predicted, w: Weights, phi: Float[Array, ""] | float) -> Predicted:
    good, bad = (out.prediction if isinstance(out, Output) else out for out in (cond, uncond))
    guided = rescale(guide(good, bad, w), good, phi)
    return cond._replace(prediction=guided) if isinstance(cond, Output) else guided


def classifier_free(
    apply: Apply, null_label: int, *, phi: Float[Array, ""] | float = 0.0
) -> Callable[[Images, Times, Labels, Weights], Predicted]:
    """From apply(x, t, y) the guided model(x, t, y, w), which calls it once, on a batch of twice the size.

    Args: phi, of `rescale`. As the weights sum to 1, it is the same whichever quantity is predicted, but for phi.
    """

    def model(x: Images, t: Times, y: Labels, w: Weights) -> Predicted:
        labels = jnp.concatenate([y, jnp.full_like(y, null_label)])
        both = apply(jnp.concatenate([x, x]), jnp.concatenate([t, t]), labels)
        cond = jax.tree.map(lambda out: out[: len(y)], both)
        uncond = jax.tree.map(lambda out: out[len(y) :], both)
        return _guided(cond, uncond, w, phi)

    return model


def autoguided(
    apply: Apply, weak: Apply, *, phi: Float[Array, ""] | float = 0.0
) -> Callable[[Images, Times, Labels, Weights], Predicted]:
    """From apply(x, t, y) and that of a `weak` model the model(x, t, y, w) that is guided away from the weak one.

    weak + (1 + w) (apply - weak): `guide` with a weaker conditional prediction in the place of the unconditional one.
    As the weights sum to 1, the same holds for eps as for the denoised images D of the paper, which writes w for 1 + w.
    Args: phi, of `rescale`.
    Source: Karras et al. 2024 (arXiv 2406.02507), D_w = w D_1 + (1 - w) D_0 with a weak model for D_0.
    """

    def model(x: Images, t: Times, y: Labels, w: Weights) -> Predicted:
        return _guided(apply(x, t, y), weak(x, t, y), w, phi)

    return model


def within(
    interval: tuple[Array | float, Array | float],
    guided: Callable[[Images, Times], Predicted],
    plain: Callable[[Images, Times], Predicted],
) -> Callable[[Images, Times], Predicted]:
    """The model(x, t) that is `guided` where low <= t <= high, and `plain` elsewhere, where `guided` is not computed.

    Args: interval, (low, high) in the unit of t: timesteps, or sigma. t must be the same in the whole batch, as it is
      in a sampler.
    Source: Kynkaanniemi et al. 2024 (arXiv 2404.07724), there in sigma.
    """
    low, high = interval

    def model(x: Images, t: Times) -> Predicted:
        return jax.lax.cond((low <= t[0]) & (t[0] <= high), guided, plain, x, t)

    return model
