"""Images from a checkpoint: the compiled sampler, and --mode=sample."""

import functools
import pathlib
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int, UInt8
from ml_collections import ConfigDict

from jaxdiff import diffusion, images
from jaxdiff import mesh as meshes
from jaxdiff.build import ARCHITECTURE, build_autoencoder, build_schedule, build_unet
from jaxdiff.config import files
from jaxdiff.config.check import require
from jaxdiff.config.fields import guidance_weights
from jaxdiff.data.latents import Whitening, params_hash
from jaxdiff.errors import ConfigError
from jaxdiff.keys import named_key
from jaxdiff.models import UNet, decode_in_parts, decode_tiled
from jaxdiff.samples import label_names, sample_labels, save_samples
from jaxdiff.training.checkpoint import Checkpoints


class Decoder(NamedTuple):
    """From whitened latents to images: the autoencoder's parameters and the latents' statistics."""

    params: Any
    whitening: Whitening


class Weak(NamedTuple):
    """The weaker model of autoguidance."""

    unet: UNet
    params: Any


class Generator:
    """Draws images from the parameters of a UNet, guided by the null class or by a weak model.

    Timesteps, coefficients, eta, and the guidance's weight, interval and rescaling are traced: only the batch size,
    clipping, the parts of decoding, and whether there is guidance, or an interval of it, make another program. Image k
    is a function of (seed, k) and its label.
    """

    def __init__(
        self,
        config: ConfigDict,
        shape: Sequence[int],
        num_classes: int,
        mesh: Mesh,
        decoder: Decoder | None = None,
        weak: Weak | None = None,
    ) -> None:
        self.mesh = mesh
        self.num_classes = num_classes
        self.shape = tuple(shape)
        self.schedule = build_schedule(config)
        self.unet = build_unet(config, self.shape[-1], num_classes)
        self.decoder = decoder
        self._others = {"decoder": decoder and decoder.params, "weak": weak and weak.params}  # traced as well
        if decoder is not None:
            self._autoencoder = build_autoencoder(config)
            self._whitening = decoder.whitening
        if weak is not None:
            self._weak_unet = weak.unet
        self._run = jax.jit(self._draw, static_argnames=("guided", "limited", "clip", "parts"))

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
        flags["parts"] = (settings.decode_batch, settings.decode_tile)
        options = (tuple(settings.guidance_interval) or (0, 0), settings.guidance_rescale)
        out = []
        for first in range(0, len(rows["index"]), size):
            batch = meshes.put_batch({name: row[first : first + size] for name, row in rows.items()}, self.mesh)
            out.append(meshes.to_host(self._run(params, self._others, plan, key, batch, *options, **flags)))
        samples = np.concatenate(out)[: len(weights) * n]
        return samples.reshape(len(weights), n, *samples.shape[1:])

    def _draw(
        self,
        params: Any,
        others: dict[str, Any],
        plan: diffusion.Plan,
        key: Array,
        rows: dict[str, Array],
        interval: tuple[Array, Array],
        phi: Array,
        *,
        guided: bool,
        limited: bool,
        clip: bool,
        parts: tuple[int, int],
    ) -> UInt8[Array, "batch h w 3"]:
        def apply(x: Array, t: Array, y: Array) -> Any:
            prediction: Any = self.unet.apply(params, x, t, y)
            return prediction[..., : self.shape[-1]]  # eps; a learned variance, behind it, is not used

        def plain(x: Array, t: Array) -> Array:
            return apply(x, t, rows["label"])

        def apply_weak(x: Array, t: Array, y: Array) -> Any:
            prediction: Any = self._weak_unet.apply(others["weak"], x, t, y)
            return prediction[..., : self.shape[-1]]

        def with_guidance(x: Array, t: Array) -> Array:
            if others["weak"] is None:
                model = diffusion.classifier_free(apply, self.num_classes, phi=phi)
            else:
                model = diffusion.autoguided(apply, apply_weak, phi=phi)
            return model(x, t, rows["label"], rows["guidance"])

        model: Callable[[Array, Array], Array] = with_guidance if guided else plain
        if guided and limited:
            model = diffusion.within(interval, with_guidance, plain)

        keys = diffusion.sample_keys(key, rows["index"])
        x = diffusion.sample(model, plan, diffusion.initial_noise(keys, self.shape), keys, clip=clip)
        if others["decoder"] is not None:
            z = self._whitening.unwhiten(x)
            x = self._decode(others["decoder"], z, *parts)
        return images.to_uint8(x)

    def _decode(self, params: Any, z: Array, batch_size: int, tile: int) -> Array:
        def whole(params: Any, z: Array) -> Any:
            return self._autoencoder.apply(params, z, method="decode")

        def in_parts(params: Any, z: Array) -> Array:
            def decode(z: Array) -> Array:
                one = functools.partial(whole, params)
                return decode_tiled(one, z, tile) if tile else one(z)

            return decode_in_parts(decode, z, -(-batch_size // self.mesh.size) or len(z))

        if not (batch_size or tile):
            return whole(params, z)
        # Each device takes its own images apart: parts of the whole batch would have to be sent to the others.
        own = PartitionSpec("data")
        return jax.shard_map(in_parts, mesh=self.mesh, in_specs=(PartitionSpec(), own), out_specs=own, check_vma=False)(
            params, z
        )


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
    for field in sorted(set(config.diffusion) - {"label_dropout"}):
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
    weak_params = checkpoints.restore_params(generator.abstract_params(), weak_step, s.weights)
    checkpoints.close()
    return Weak(generator.unet, weak_params), weak_step


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
    params = checkpoints.restore_params(generator.abstract_params(), step, s.weights)
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
    sheets = []
    for w, samples in zip(guidance_weights(s), generator.sweep(params, s, labels), strict=True):
        path = workdir / "samples" / f"step{meta['step']}-{s.weights}-{s.sampler}{s.steps}-w{w:g}{by}-seed{s.seed}"
        if meshes.is_main():
            own = labels if config.model.conditional else None
            sheets.append(save_samples(path, samples, own, ConfigDict({**s.to_dict(), "guidance": w})))
    return sheets
