"""The autoencoder's objective: reconstruction in pixels and features, KL, and a patch discriminator."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxdiff.images import from_batch, psnr, ssim
from jaxdiff.models import AutoencoderKL
from jaxdiff.models.discriminator import PatchDiscriminator
from jaxdiff.models.perceptual import Perceptual
from jaxdiff.training.step import Critic, Metrics, Objective, Params

MAX_WEIGHT = 1e4  # of the adaptive weight, for a loss that is summed over an image's values


class Adversary(NamedTuple):
    """The discriminator, the weight of its loss, and the step from which on it plays."""

    discriminator: PatchDiscriminator
    weight: float
    start: int


def autoencoder_objective(
    model: AutoencoderKL,
    *,
    kl_weight: float,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 0.0,
    adversary: Adversary | None = None,
) -> Objective:
    """Mean |image - decode(z)| + perceptual_weight distance + kl_weight KL(q(z | image) || N(0, I)) / image values.

    That is the loss of validation, and of training without an adversary. With one, training divides the first two by
    exp(s) and adds s, a log variance that is learnt, and adds the loss of deceiving the discriminator. Its weight makes
    its gradient at the last layer as large as that of the first two, times the adversary's weight (of accumulated parts
    each has its own).
    Source: Rombach et al. 2022 (arXiv 2112.10752), section G, and Esser et al. 2021 (arXiv 2012.09841), eq. 7, where
    all is summed over the values of an image, not averaged.
    """

    def prepare(batch: dict[str, Array], key: PRNGKeyArray, memory: Any = ()) -> dict[str, Array]:
        b, h, w, _ = batch["image"].shape
        f = model.downsampling
        noise = jax.random.normal(key, (b, h // f, w // f, model.latent_channels))
        return {"image": from_batch(batch), "noise": noise}

    def reconstruction(decoded: Array, image: Array, frozen: Any) -> tuple[Array, Metrics]:
        error = jnp.abs(decoded - image).mean(axis=(1, 2, 3))
        metrics = {"psnr": psnr(decoded, image)}
        if perceptual:
            metrics[perceptual.name] = perceptual.distance(frozen, decoded, image, model.dtype)
            error = error + perceptual_weight * metrics[perceptual.name]
        return error, metrics

    def loss(
        params: Params, inputs: dict[str, Array], key: PRNGKeyArray | None, frozen: Any
    ) -> tuple[Float[Array, " batch"], Metrics]:
        output: Any = model.apply(params, inputs["image"], inputs["noise"])
        decoded, posterior = output
        error, metrics = reconstruction(decoded, inputs["image"], frozen)
        if key is None:
            metrics["ssim"] = ssim(decoded, inputs["image"])
        kl = posterior.kl()
        return error + kl_weight * kl / math.prod(decoded.shape[1:]), {"kl": kl, **metrics}

    def gradient(
        params: Params, critic: Params, inputs: dict[str, Array], step: Int[Array, ""], frozen: Any
    ) -> tuple[tuple[Params, Params], dict[str, Float[Array, ""]]]:
        assert adversary is not None
        image, values = inputs["image"], math.prod(inputs["image"].shape[1:])

        def forward(p: Params) -> tuple[Array, Array]:
            output: Any = model.apply(p, image, inputs["noise"])
            return output[0], output[1].kl().mean()

        def nll(x: Array, logvar: Array) -> tuple[Array, dict[str, Array]]:
            error, metrics = reconstruction(x, image, frozen)
            metrics = {name: value.mean() for name, value in {"loss": error, **metrics}.items()}
            return metrics["loss"] / jnp.exp(logvar) + logvar, metrics

        def last_layer(x: Array) -> Array:  # norm of the gradient there; nothing below it is computed
            grads = pull((x, jnp.zeros_like(kl)))[0]["params"]["decoder"]["conv_out"]["kernel"]
            return optax.tree.norm(grads)

        (decoded, kl), pull = jax.vjp(forward, params)
        grads, metrics = jax.grad(nll, (0, 1), has_aux=True)(decoded, critic["logvar"])
        to_nll, to_logvar = grads
        playing = step >= adversary.start
        game = play(adversary.discriminator, critic["discriminator"], decoded, image, playing)
        # As strong a pull as the reconstruction's, at the layer that both act on last.
        weight = jnp.minimum(last_layer(to_nll) / (last_layer(game.to_decoded) + 1e-4), MAX_WEIGHT / values)
        weight = jnp.where(playing, adversary.weight * weight, 0.0)
        (to_params,) = pull((to_nll + weight * game.to_decoded, jnp.full_like(kl, kl_weight / values)))
        metrics["loss"] += kl_weight * kl / values
        metrics |= {"kl": kl, "logvar": critic["logvar"], "g_weight": weight, **game.metrics}
        return (to_params, {"discriminator": game.to_discriminator, "logvar": to_logvar}), metrics

    def init(key: PRNGKeyArray) -> Params:
        assert adversary is not None
        size = 2 ** (adversary.discriminator.layers + 2)
        return {
            "discriminator": adversary.discriminator.init(key, jnp.zeros((1, size, size, 3))),
            "logvar": jnp.zeros(()),
        }

    critic = None if adversary is None else Critic(init, gradient)
    return Objective(prepare, loss, perceptual.params if perceptual else (), critic)


class Game(NamedTuple):
    """Gradients of the generator's loss for the decoded images, and of the discriminator's for its parameters."""

    to_decoded: Float[Array, "batch h w 3"]
    to_discriminator: Params
    metrics: dict[str, Float[Array, ""]]


def play(
    discriminator: PatchDiscriminator, params: Params, decoded: Array, image: Array, playing: Array | bool
) -> Game:
    """Hinge losses: -E D(decoded) for the decoder; E (1 - D(image))+ / 2 + E (1 + D(decoded))+ / 2 for D.

    Where not `playing` all is zero, and not computed. Source: Lim & Ye 2017 (arXiv 1705.02894), section 3.
    """

    def scores(p: Params, x: Array) -> Array:
        return discriminator.apply(p, x)  # type: ignore[return-value]

    def generator_loss(x: Array) -> Array:
        return -scores(params, x).mean()

    def discriminator_loss(p: Params) -> tuple[Array, dict[str, Array]]:
        real, fake = scores(p, image), scores(p, decoded)
        loss = (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()) / 2
        return loss, {"d_loss": loss, "d_real": real.mean(), "d_fake": fake.mean()}

    def game() -> Game:
        g_loss, to_decoded = jax.value_and_grad(generator_loss)(decoded)
        to_discriminator, metrics = jax.grad(discriminator_loss, has_aux=True)(params)
        return Game(to_decoded, to_discriminator, {"g_loss": g_loss, **metrics})

    shapes = jax.eval_shape(game)
    return lax.cond(playing, game, lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
