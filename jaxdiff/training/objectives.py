"""What a diffusion model minimises. The autoencoder's loss: adversarial.py."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxdiff import diffusion
from jaxdiff.data.latents import Whitening
from jaxdiff.images import from_batch
from jaxdiff.models import Network, Posterior
from jaxdiff.training.step import Memory, Objective

Batch = dict[str, Array]


class Recipe(NamedTuple):
    """How a diffusion model is trained; the defaults are DDPM's.

    prediction, weighting, time_sampling: names in diffusion.PREDICTIONS, .WEIGHTINGS, .TIMES (or "importance").
    loss: mse, hybrid or vlb. gamma: of the weighting. time_normal: mean and deviation of the times' distribution.
    """

    label_dropout: float
    prediction: str = "eps"
    sigma_data: float = 0.5
    loss: str = "mse"
    weighting: str = "simple"
    gamma: float = 0.0
    time_sampling: str = "uniform"
    time_normal: tuple[float, float] = (0.0, 1.0)
    stratified: bool = False


class Predicted(NamedTuple):
    """What an auxiliary loss is computed of: the inputs of the step, and the network's whole output."""

    inputs: Batch
    output: Array


Auxiliary = Callable[[Any, Predicted], Float[Array, " batch"]]  # (parameters, predicted) -> loss of each sample


def diffusion_objective(
    network: Network,
    process: diffusion.Process,
    recipe: Recipe,
    *,
    null_label: int,
    whitening: Whitening | None = None,
    auxiliary: Mapping[str, Auxiliary] | None = None,
) -> Objective:
    """E w(t) |F - F_theta(x_t, t, y)|^2, y replaced by the null class with probability `label_dropout`; with `hybrid`
    the variational bound of the variance beside it, with `vlb` that bound alone.

    Batches hold {"image": uint8, "label"}, or with `whitening` {"mean", "logvar", "label"} of latents' posteriors.
    Args: auxiliary, further losses by the names that they are logged with, which are added to it.
    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 14; Ho & Salimans 2022 (arXiv 2207.12598), algorithm 1; Nichol &
    Dhariwal 2021 (arXiv 2102.09672), eq. 16.
    """
    kind = diffusion.PREDICTIONS[recipe.prediction]
    schedule = process if isinstance(process, diffusion.Schedule) else None
    important = recipe.time_sampling == "importance"
    if schedule is None and (important or recipe.loss != "mse"):
        raise ValueError("importance sampling and variational bounds are for schedules of discrete steps")

    def times(key: PRNGKeyArray, batch: int, history: Any) -> tuple[Array, Array]:
        if history != ():
            return diffusion.sample_important(key, batch, history, stratified=recipe.stratified)
        if schedule is not None:
            t = diffusion.sample_timesteps(key, batch, len(schedule.betas), stratified=recipe.stratified)
        else:
            u = diffusion.sample_unit(key, batch, stratified=recipe.stratified)
            t = diffusion.TIMES[recipe.time_sampling].quantile(u, *recipe.time_normal)
        return t, jnp.ones(batch)

    def prepare(batch: Batch, key: PRNGKeyArray, history: Any = ()) -> Batch:
        keys = jax.random.split(key, 4)
        if whitening is None:
            x0 = from_batch(batch)
        else:
            posterior = Posterior(batch["mean"], batch["logvar"])
            x0 = whitening.whiten(posterior.sample(jax.random.normal(keys[0], posterior.mean.shape)))
        t, weight = times(keys[1], x0.shape[0], history)
        eps = jax.random.normal(keys[2], x0.shape)
        drop = jax.random.bernoulli(keys[3], recipe.label_dropout, (x0.shape[0],))
        y = jnp.where(drop, null_label, batch["label"])
        return {"x0": x0, "eps": eps, "t": t, "y": y, "weight": weight}

    def loss(params: Any, inputs: Batch, key: PRNGKeyArray | None, frozen: Any) -> tuple[Array, dict[str, Array]]:
        rngs = None if key is None else {"dropout": key}
        x0, eps, t = inputs["x0"], inputs["eps"], inputs["t"]
        a, s = process.levels(t, x0.ndim)
        x = a * x0 + s * eps
        scaled = kind.input_scale(a, s, recipe.sigma_data) * x
        output: Any = network.apply(params, scaled, process.network_time(t), inputs["y"], key is None, rngs=rngs)
        prediction, learned = output[..., : x0.shape[-1]], output[..., x0.shape[-1] :]
        target = kind.target(a, s, recipe.sigma_data)
        metrics: dict[str, Array] = {}
        total = jnp.zeros(len(x0))
        if recipe.loss != "vlb":
            weight = diffusion.weight_of(recipe.weighting, target, a, s, recipe.gamma).reshape(-1)
            total = weight * diffusion.squared_error(prediction, diffusion.to_target(target, x0, eps))
        if schedule is not None and recipe.loss != "mse":
            # In the hybrid loss the bound trains the variance alone: the mean has its own, better behaved loss.
            held = jax.lax.stop_gradient(prediction) if recipe.loss == "hybrid" else prediction
            bound = len(schedule.betas) * diffusion.vlb_term(
                schedule,
                x0,
                x,
                t,
                diffusion.to_x0(target, a, s, x, held),
                diffusion.learned_fraction(learned),
                discrete=whitening is None,
            )
            metrics |= {"vlb": inputs["weight"] * bound} | ({"mse": total} if recipe.loss == "hybrid" else {})
            total = total + bound / 1000 if recipe.loss == "hybrid" else bound
        total = inputs["weight"] * total
        for name, extra in (auxiliary or {}).items():
            metrics[name] = extra(params, Predicted(inputs, output))
            total = total + metrics[name]
        return total, metrics

    if schedule is None or not important:
        return Objective(prepare, loss)

    def remember(history: Any, inputs: Batch, metrics: Batch) -> Any:
        return diffusion.remember(history, inputs["t"], metrics["vlb"] / inputs["weight"])

    return Objective(prepare, loss, memory=Memory(diffusion.new_history(len(schedule.betas)), remember))
