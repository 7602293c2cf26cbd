"""What is trained in a stage: the autoencoder, or the UNet in pixels or latents."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8
from ml_collections import ConfigDict

from jaxdiff import images
from jaxdiff import mesh as meshes
from jaxdiff.build import build_autoencoder
from jaxdiff.data import Source, device_batches, train_batches
from jaxdiff.diffusion import TIMES, WEIGHTINGS
from jaxdiff.generator import Decoder, Generator
from jaxdiff.models.discriminator import PatchDiscriminator
from jaxdiff.models.perceptual import load_perceptual
from jaxdiff.samples import columns, label_names, sample_labels
from jaxdiff.training.adversarial import Adversary, autoencoder_objective
from jaxdiff.training.averages import updates
from jaxdiff.training.objectives import Recipe, diffusion_objective
from jaxdiff.training.optimizer import recipe_optimizer, total_steps
from jaxdiff.training.step import Objective, TrainStep, make_init, make_train_step

GRID_IMAGES = 40  # in the grids that are logged during training


class Experiment(NamedTuple):
    """All that the training loop needs to know of a stage.

    init: key -> parameters. meta: goes into every checkpoint. render: parameters -> picture [H, W, 3], uint8. score:
    parameters -> numbers for the log, every `config.eval.every` steps.
    """

    stage: str
    init: Callable[[Any], Any]
    objective: Objective
    train: Source
    val: Source
    meta: dict[str, Any]
    render: Callable[[Any], UInt8[np.ndarray, "h w 3"]]
    score: Callable[[Any], dict[str, float]] | None = None


def build_recipe(config: ConfigDict) -> Recipe:
    """How `config.diffusion` trains a diffusion model."""
    d = config.diffusion
    published = WEIGHTINGS[d.weighting].gamma
    mean, std = tuple(d.time_normal) or (TIMES[d.time_sampling].normal if d.time_sampling in TIMES else (0.0, 1.0))
    return Recipe(
        label_dropout=d.label_dropout,
        prediction=d.prediction,
        sigma_data=d.sigma_data,
        loss=d.loss,
        weighting=d.weighting,
        gamma=d.weighting_gamma or (d.sigma_data if published is None else published),
        time_sampling=d.time_sampling,
        time_normal=(mean, std),
        stratified=d.stratified,
    )


def diffusion_experiment(
    config: ConfigDict,
    train: Source,
    val: Source,
    mesh: Mesh,
    *,
    decoder: Decoder | None = None,
    autoencoder: str = "",
) -> tuple[Experiment, Generator]:
    """The UNet on images, or with a `decoder` on latents; `autoencoder` is its workdir as seen from this one."""
    first = train.batch(np.zeros(1, int))
    shape = first["image" if decoder is None else "mean"].shape[1:]
    names = list(train.class_names)
    generator = Generator(config, shape, len(names), mesh, decoder)
    whitening = decoder.whitening if decoder else None
    objective = diffusion_objective(
        generator.network, generator.process, build_recipe(config), null_label=len(names), whitening=whitening
    )
    meta: dict[str, Any] = {"class_names": names, "shape": list(shape)}
    if whitening is not None:
        meta |= {"whitening": whitening._asdict(), "autoencoder": autoencoder}
    labels = sample_labels(config.sample, label_names(config, names))[:GRID_IMAGES]

    def init(key: Any) -> Any:
        one = jnp.zeros((1,), jnp.int32)
        return generator.network.init(key, jnp.zeros((1, *shape)), one, one)

    def render(params: Any) -> UInt8[np.ndarray, "h w 3"]:
        return images.grid(generator(params, config.sample, labels), columns(labels))

    return Experiment("diffusion", init, objective, train, val, meta, render), generator


def step_and_init(experiment: Experiment, config: ConfigDict, mesh: Mesh) -> tuple[TrainStep, jax.stages.Wrapped]:
    """The training step of an experiment by the recipe `config`, and key -> its first state."""
    objective, others = experiment.objective, updates(config)
    optimizer, schedule = recipe_optimizer(config, total_steps(config, len(experiment.train)))
    step = make_train_step(
        objective,
        optimizer,
        schedule,
        mesh,
        seed=config.seed,
        ema_decay=config.ema_decay,
        accumulate=config.accumulate,
        averages=others,
    )
    return step, make_init(experiment.init, optimizer, mesh, objective.critic, others, objective.memory)


def read_batches(
    experiment: Experiment, config: ConfigDict, mesh: Mesh, start: int, stop: int
) -> Iterator[dict[str, Any]]:
    """The training batches of steps [start, stop) as global arrays, read as `config.data` says."""
    batches = train_batches(
        experiment.train,
        seed=config.seed,
        batch_size=config.batch_size,
        start=start,
        stop=stop,
        flip=config.data.flip,
        threads=config.data.threads,
        workers=config.data.workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return device_batches(batches, meshes.batch_sharding(mesh))


def autoencoder_experiment(config: ConfigDict, train: Source, val: Source, mesh: Mesh) -> Experiment:
    """The autoencoder on images; rendered are validation images above their reconstructions."""
    model = build_autoencoder(config)
    size, f = config.data.image_size, model.downsampling

    def init(key: Any) -> Any:
        noise = jnp.zeros((1, size // f, size // f, model.latent_channels))
        return model.init(key, jnp.zeros((1, size, size, 3)), noise)

    @jax.jit
    def reconstruct(params: Any, batch: Any) -> Any:
        posterior: Any = model.apply(params, images.to_unit(batch), method="encode")
        decoded: Any = model.apply(params, posterior.mean, method="decode")
        return images.to_uint8(decoded)

    count = -(-10 // mesh.size) * mesh.size

    def render(params: Any) -> UInt8[np.ndarray, "h w 3"]:
        real = val.batch(np.arange(count) % len(val))["image"]
        fake = meshes.to_host(reconstruct(params, meshes.put_batch(real, mesh)))
        return images.grid(np.concatenate([real, fake]), count)

    meta = {"class_names": list(train.class_names)}
    a = config.autoencoder
    adversary = None
    if a.disc_weight:
        start = round(a.disc_start * total_steps(config, len(train)))
        adversary = Adversary(PatchDiscriminator(layers=a.disc_layers, dtype=model.dtype), a.disc_weight, start)
    objective = autoencoder_objective(
        model,
        kl_weight=a.kl_weight,
        perceptual=load_perceptual(a.lpips) if a.perceptual_weight else None,
        perceptual_weight=a.perceptual_weight,
        adversary=adversary,
    )
    return Experiment("autoencoder", init, objective, train, val, meta, render)
