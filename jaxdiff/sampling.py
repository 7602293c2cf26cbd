"""Images from a checkpoint: the compiled sampler, and --mode=sample."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt8
from ml_collections import ConfigDict

from jaxdiff import diffusion, images
from jaxdiff import mesh as meshes
from jaxdiff.build import ARCHITECTURE, build_autoencoder, build_schedule, build_unet
from jaxdiff.config import files
from jaxdiff.config.check import require
from jaxdiff.config.fields import guidance_weights
from jaxdiff.data.latents import Whitening
from jaxdiff.errors import ConfigError
from jaxdiff.keys import named_key
from jaxdiff.samples import sample_labels, save_samples
from jaxdiff.training.checkpoint import Checkpoints


class Decoder(NamedTuple):
    """From whitened latents to images: the autoencoder's parameters and the latents' statistics."""

    params: Any
    whitening: Whitening


class Generator:
    """Draws images from the parameters of a UNet.

    Timesteps, coefficients, eta, and the guidance's weight, interval and rescaling are traced: only the batch size,
    clipping, and whether there is guidance, or an interval of it, make another program. Image k is a function of
    (seed, k) and its label.
    """

    def __init__(
        self,
        config: ConfigDict,
        shape: Sequence[int],
        num_classes: int,
        mesh: Mesh,
        decoder: Decoder | None = None,
    ) -> None:
        self.mesh = mesh
        self.num_classes = num_classes
        self.shape = tuple(shape)
        self.schedule = build_schedule(config)
        self.unet = build_unet(config, self.shape[-1], num_classes)
        self.decoder_params = None
        if decoder is not None:
            self._autoencoder = build_autoencoder(config)
            self._whitening = decoder.whitening
            self.decoder_params = decoder.params
        self._run = jax.jit(self._draw, static_argnames=("guided", "limited", "clip"))

    def abstract_params(self) -> Any:
        """Shapes and shardings of the UNet's parameters."""
        x, one = jnp.zeros((1, *self.shape)), jnp.zeros((1,), jnp.int32)
        tree = jax.eval_shape(self.unet.init, jax.random.key(0), x, one, one)
        sharding = meshes.replicated(self.mesh)
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)

    def __call__(
        self, params: Any, settings: ConfigDict, labels: Int[np.ndarray, " n"]
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """Images 0..n-1 of the classes `labels`, as the config fields `sample` in `settings` say, at one weight."""
        (samples,) = self.sweep(params, settings, labels)
        return samples

    def sweep(
        self, params: Any, settings: ConfigDict, labels: Int[np.ndarray, " n"]
    ) -> UInt8[np.ndarray, "weights n h w 3"]:
        """The same images at every weight of `settings.guidance`, from the same noise and by one program."""
        plan = diffusion.make_plan(
            self.schedule, settings.sampler, steps=settings.steps, spacing=settings.spacing, eta=settings.eta
        )
        key = named_key(settings.seed, "sample")
        weights, n = guidance_weights(settings), len(labels)
        rows = {
            "index": np.tile(np.arange(n, dtype=np.int32), len(weights)),
            "label": np.tile(np.asarray(labels, np.int32), len(weights)),
            "guidance": np.repeat(np.array(weights, np.float32), n),
        }
        # Every batch has the same size, so that there is one program and image k does not depend on n.
        size = -(-settings.batch_size // self.mesh.size) * self.mesh.size
        rows = {name: np.pad(row, (0, -len(row) % size), mode="edge") for name, row in rows.items()}
        flags = {"guided": any(weights), "limited": bool(settings.guidance_interval), "clip": settings.clip}
        options = (tuple(settings.guidance_interval) or (0, 0), settings.guidance_rescale)
        out = []
        for first in range(0, len(rows["index"]), size):
            batch = meshes.put_batch({name: row[first : first + size] for name, row in rows.items()}, self.mesh)
            out.append(meshes.to_host(self._run(params, self.decoder_params, plan, key, batch, *options, **flags)))
        samples = np.concatenate(out)[: len(weights) * n]
        return samples.reshape(len(weights), n, *samples.shape[1:])

    def _draw(
        self,
        params: Any,
        decoder_params: Any,
        plan: diffusion.Plan,
        key: Array,
        rows: dict[str, Array],
        interval: tuple[Array, Array],
        phi: Array,
        *,
        guided: bool,
        limited: bool,
        clip: bool,
    ) -> UInt8[Array, "batch h w 3"]:
        def apply(x: Array, t: Array, y: Array) -> Any:
            return self.unet.apply(params, x, t, y)

        def plain(x: Array, t: Array) -> Array:
            return apply(x, t, rows["label"])

        def with_guidance(x: Array, t: Array) -> Array:
            model = diffusion.classifier_free(apply, self.num_classes, phi=phi)
            return model(x, t, rows["label"], rows["guidance"])

        model: Callable[[Array, Array], Array] = with_guidance if guided else plain
        if guided and limited:
            model = diffusion.within(interval, with_guidance, plain)

        keys = diffusion.sample_keys(key, rows["index"])
        x = diffusion.sample(model, plan, diffusion.initial_noise(keys, self.shape), keys, clip=clip)
        if decoder_params is not None:
            z = self._whitening.unwhiten(x)
            x = cast(Array, self._autoencoder.apply(decoder_params, z, method="decode"))
        return images.to_uint8(x)


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
    tree = jax.eval_shape(model.init, jax.random.key(0), image, noise)
    sharding = meshes.replicated(mesh)
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), tree)
    checkpoints = Checkpoints(folder)
    params = checkpoints.restore_params(abstract, step, "ema")
    checkpoints.close()
    return params


def run_sample(config: ConfigDict, workdir: pathlib.Path, step: int | None) -> list[pathlib.Path]:
    """--mode=sample: draw images with the newest (or given) checkpoint of a workdir, and write a grid a weight.

    Returns: the paths of the grids.
    """
    mesh, s = meshes.make_mesh(), config.sample
    checkpoints = Checkpoints(workdir)
    step = checkpoints.pick(step)
    meta = checkpoints.meta(step)
    labels = sample_labels(s, meta["class_names"])
    decoder = None
    if config.experiment == "ldm":
        decoder = Decoder(load_autoencoder(config, workdir / meta["autoencoder"], mesh), Whitening(**meta["whitening"]))
    generator = Generator(config, meta["shape"], len(meta["class_names"]), mesh, decoder)
    params = checkpoints.restore_params(generator.abstract_params(), step, s.weights)
    checkpoints.close()
    sheets = []
    for w, samples in zip(guidance_weights(s), generator.sweep(params, s, labels), strict=True):
        path = workdir / "samples" / f"step{step}-{s.weights}-{s.sampler}{s.steps}-w{w:g}-seed{s.seed}"
        if meshes.is_main():
            sheets.append(save_samples(path, samples, labels, ConfigDict({**s.to_dict(), "guidance": w})))
    return sheets
