"""What a diffusion model minimises. The autoencoder's loss: adversarial.py."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxdiff.data.latents import Whitening
from jaxdiff.diffusion import Schedule, q_sample, sample_timesteps, simple_loss
from jaxdiff.images import from_batch
from jaxdiff.models import Posterior, UNet
from jaxdiff.training.step import Objective


def diffusion_objective(
    unet: UNet, schedule: Schedule, *, label_dropout: float, whitening: Whitening | None = None
) -> Objective:
    """E |eps - eps_theta(x_t, t, y)|^2, t uniform, y replaced by the null class with probability `label_dropout`.

    Batches hold {"image": uint8, "label"}, or with `whitening` {"mean", "logvar", "label"} of latents' posteriors.
    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 14; Ho & Salimans 2022 (arXiv 2207.12598), algorithm 1.
    """

    def prepare(batch: dict[str, Array], key: PRNGKeyArray) -> dict[str, Array]:
        keys = jax.random.split(key, 4)
        if whitening is None:
            x0 = from_batch(batch)
        else:
            posterior = Posterior(batch["mean"], batch["logvar"])
            x0 = whitening.whiten(posterior.sample(jax.random.normal(keys[0], posterior.mean.shape)))
        t = sample_timesteps(keys[1], x0.shape[0], len(schedule.betas))
        eps = jax.random.normal(keys[2], x0.shape)
        drop = jax.random.bernoulli(keys[3], label_dropout, (x0.shape[0],))
        y = jnp.where(drop, unet.num_classes, batch["label"])
        return {"x_t": q_sample(schedule, x0, t, eps), "t": t, "eps": eps, "y": y}

    def loss(
        params: Any, inputs: dict[str, Array], key: PRNGKeyArray | None, frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        rngs = None if key is None else {"dropout": key}
        prediction: Any = unet.apply(params, inputs["x_t"], inputs["t"], inputs["y"], key is None, rngs=rngs)
        return simple_loss(prediction, inputs["eps"]), {}

    return Objective(prepare, loss)
