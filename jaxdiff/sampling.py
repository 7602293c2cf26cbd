"""Images from a checkpoint: what is read of workdirs, and --mode=sample."""

import pathlib
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxdiff import mesh as meshes
from jaxdiff.build import ARCHITECTURE, build_autoencoder
from jaxdiff.config import files
from jaxdiff.config.fields import guidance_weights
from jaxdiff.config.require import require
from jaxdiff.data.latents import Whitening, params_hash
from jaxdiff.errors import ConfigError
from jaxdiff.generator import Decoder, Generator, Weak
from jaxdiff.models import forms
from jaxdiff.samples import label_names, sample_labels, save_samples
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.snapshots import restore_weights

# The fields `diffusion` that say how a network was trained, and not what it predicts.
TRAINING_ONLY = {
    *("label_dropout", "loss", "weighting", "weighting_gamma", "time_sampling", "time_normal", "stratified"),
}


def check_autoencoder(config: ConfigDict, folder: pathlib.Path) -> None:
    """ConfigError when `folder` is no workdir of configs/vae.py, or has another architecture than the config."""
    path = folder / "config.json"
    if not path.exists() or files.load(path).experiment != "vae":
        raise ConfigError(f"config.autoencoder.path = {str(folder)!r}: must be a workdir made by configs/vae.py")
    for field in ARCHITECTURE:
        own, value = config.autoencoder[field], files.load(path).autoencoder[field]
        require(own == value, f"autoencoder.{field}", own, f"{value!r} as in {path}")
    Checkpoints(folder).pick(None)


def load_autoencoder(config: ConfigDict, folder: pathlib.Path, mesh: Mesh, step: int | None = None) -> Any:
    """The averaged parameters of the autoencoder in the workdir `folder`, newest or of a step; errors as in
    `check_autoencoder` and `Checkpoints.pick`."""
    check_autoencoder(config, folder)
    model = build_autoencoder(config)
    size = config.data.image_size
    image, f = jnp.zeros((1, size, size, 3)), model.downsampling
    noise = jnp.zeros((1, size // f, size // f, model.latent_channels))
    tree = forms.abstract_init(model, image, noise)
    sharding = meshes.replicated(mesh)
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)
    checkpoints = Checkpoints(folder)
    params = checkpoints.restore_params(abstract, step, "ema")
    checkpoints.close()
    return params


def load_weak(
    config: ConfigDict, workdir: pathlib.Path, step: int, meta: dict[str, Any], mesh: Mesh, decoder: Decoder | None
) -> tuple[Weak, int]:
    """The weak model that `config.sample` names for the checkpoint (workdir, step) with `meta`, and its own step.

    Raises: ConfigError where it is that checkpoint, or has another shape, classes, schedule, autoencoder or whitening.
    """
    s, folder = config.sample, pathlib.Path(config.sample.autoguidance)

    def check(ok: bool, allowed: str) -> None:
        require(ok, "sample.autoguidance", s.autoguidance, f"a workdir with {allowed}")

    def alike(name: str, own: Any, weak: Any) -> None:
        check(own == weak, f"{name} {reprlib.repr(own)} as {workdir}, not {reprlib.repr(weak)}")

    check((folder / "config.json").exists(), "a config.json")
    weak_config = files.load(folder / "config.json")
    alike("experiment", config.experiment, weak_config.experiment)
    for field in sorted(set(config.diffusion) - TRAINING_ONLY):
        alike(f"diffusion.{field}", config.diffusion[field], weak_config.diffusion[field])
    checkpoints = Checkpoints(folder)
    steps = checkpoints.steps
    check(bool(steps), "a checkpoint")
    weak_step = s.autoguidance_step or steps[-1]
    other = (folder.resolve(), weak_step) != (workdir.resolve(), step)
    allowed = f"one of {', '.join(map(str, steps))} of {folder}, and not the one that is guided"
    require(weak_step in steps and other, "sample.autoguidance_step", weak_step, allowed)
    weak_meta = checkpoints.meta(weak_step)
    for name, key in (("shape", "shape"), ("classes", "class_names")):
        alike(name, meta[key], weak_meta[key])
    if decoder is not None:
        autoencoder = folder / weak_meta["autoencoder"]
        if autoencoder.resolve() != (workdir / meta["autoencoder"]).resolve():
            theirs = load_autoencoder(weak_config, autoencoder, mesh)
            alike("autoencoder", *(params_hash(meshes.to_host(params)) for params in (decoder.params, theirs)))
        alike("whitening", meta["whitening"], weak_meta["whitening"])
    generator = Generator(weak_config, weak_meta["shape"], len(weak_meta["class_names"]), mesh)
    weak_params = restore_weights(checkpoints, weak_config, generator.abstract_params(), weak_step, s.weights)
    checkpoints.close()
    return Weak(generator.network, weak_params), weak_step


def load_generator(
    config: ConfigDict, workdir: pathlib.Path, mesh: Mesh, step: int | None
) -> tuple[Generator, Any, dict[str, Any]]:
    """The generator, the parameters `config.sample.weights`, and the meta, of a step (None = newest) of a workdir.

    With `config.sample.autoguidance`, the meta says in "weak_step" which checkpoint of it guides.
    """
    checkpoints, s = Checkpoints(workdir), config.sample
    step = checkpoints.pick(step)
    meta = checkpoints.meta(step)
    sample_labels(s, label_names(config, meta["class_names"]))
    decoder, weak = None, None
    if config.experiment == "ldm":
        decoder = Decoder(load_autoencoder(config, workdir / meta["autoencoder"], mesh), Whitening(**meta["whitening"]))
    if s.autoguidance:
        weak, meta["weak_step"] = load_weak(config, workdir, step, meta, mesh, decoder)
    generator = Generator(config, meta["shape"], len(meta["class_names"]), mesh, decoder, weak)
    params = restore_weights(checkpoints, config, generator.abstract_params(), step, s.weights)
    checkpoints.close()
    return generator, params, {**meta, "step": step}


def run_sample(config: ConfigDict, workdir: pathlib.Path, step: int | None) -> list[pathlib.Path]:
    """--mode=sample: draw images with the newest (or given) checkpoint of a workdir, and write a grid a weight.

    Returns: the paths of the grids.
    """
    s = config.sample
    generator, params, meta = load_generator(config, workdir, meshes.make_mesh(), step)
    labels = sample_labels(s, label_names(config, meta["class_names"]))
    by = f"-auto{meta['weak_step']}" if s.autoguidance else ""
    weights = s.weights.replace(":", "-")
    sheets = []
    for w, samples in zip(guidance_weights(s), generator.sweep(params, s, labels), strict=True):
        path = workdir / "samples" / f"step{meta['step']}-{weights}-{s.sampler}{s.steps}-w{w:g}{by}-seed{s.seed}"
        if meshes.is_main():
            own = labels if config.model.conditional else None
            sheets.append(save_samples(path, samples, own, ConfigDict({**s.to_dict(), "guidance": w})))
    return sheets
