"""The compiled sampler: images from the parameters of a UNet."""

import functools
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
from jaxdiff.build import build_autoencoder, build_network, build_schedule
from jaxdiff.config.fields import guidance_weights
from jaxdiff.data.latents import Whitening
from jaxdiff.keys import named_key
from jaxdiff.models import UNet, decode_in_parts, decode_tiled


class Decoder(NamedTuple):
    """From whitened latents to images: the autoencoder's parameters and the latents' statistics."""

    params: Any
    whitening: Whitening


class Weak(NamedTuple):
    """The weaker model of autoguidance."""

    network: UNet
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
        self.network = build_network(config, self.shape[-1], num_classes)
        self.decoder = decoder
        self._others = {"decoder": decoder and decoder.params, "weak": weak and weak.params}  # traced as well
        if decoder is not None:
            self._autoencoder = build_autoencoder(config)
            self._whitening = decoder.whitening
        if weak is not None:
            self._weak_network = weak.network
        static = ("guided", "limited", "clip", "parts")
        self._run = jax.jit(self._draw, static_argnames=static)
        self._run_watched = jax.jit(
            self._watch, static_argnames=(*static, "steps"), out_shardings=meshes.batch_sharding(mesh)
        )

    def abstract_params(self) -> Any:
        """Shapes and shardings of the UNet's parameters."""
        x, one = jnp.zeros((1, *self.shape)), jnp.zeros((1,), jnp.int32)
        tree = jax.eval_shape(self.network.init, jax.random.key(0), x, one, one)
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
        options, flags = self._options(settings)
        out = []
        for first in range(0, len(rows["index"]), size):
            batch = meshes.put_batch({name: row[first : first + size] for name, row in rows.items()}, self.mesh)
            out.append(meshes.to_host(self._run(params, self._others, plan, key, batch, *options, **flags)))
        samples = np.concatenate(out)[: len(weights) * n]
        return samples.reshape(len(weights), n, *samples.shape[1:])

    def denoising(
        self, params: Any, settings: ConfigDict, labels: Int[np.ndarray, " n"], frames: int = 8
    ) -> dict[str, np.ndarray]:
        """How images 0..n-1 come about: "t" [k], and uint8 [k, n, h, w, 3] of as many steps evenly chosen, "x_t" before
        the step and "x0" that is predicted in it, both decoded where they are latents; at the first weight."""
        plan = diffusion.make_plan(
            self.schedule, settings.sampler, steps=settings.steps, spacing=settings.spacing, eta=settings.eta
        )
        n, w = len(labels), guidance_weights(settings)[0]
        rows = {
            "index": np.arange(n, dtype=np.int32),
            "label": np.asarray(labels, np.int32),
            "guidance": np.full(n, w, np.float32),
        }
        rows = {name: np.pad(row, (0, -n % self.mesh.size), mode="edge") for name, row in rows.items()}
        steps = tuple(int(i) for i in np.unique(np.linspace(0, settings.steps - 1, frames).round()))
        options, flags = self._options(settings)
        key, batch = named_key(settings.seed, "sample"), meshes.put_batch(rows, self.mesh)
        arguments = (params, self._others, plan, key, batch, *options)
        x_t, x0 = meshes.to_host(self._run_watched(*arguments, steps=steps, **flags))
        return {
            "t": np.asarray(plan.timesteps)[list(steps)],
            "x_t": x_t[:n].swapaxes(0, 1),
            "x0": x0[:n].swapaxes(0, 1),
        }

    @staticmethod
    def _options(settings: ConfigDict) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """The traced settings of guidance, and what makes another program."""
        flags: dict[str, Any] = {"guided": any(guidance_weights(settings)), "limited": bool(settings.guidance_interval)}
        flags |= {"clip": settings.clip, "parts": (settings.decode_batch, settings.decode_tile)}
        return (tuple(settings.guidance_interval) or (0, 0), settings.guidance_rescale), flags

    def _model(
        self,
        params: Any,
        others: dict[str, Any],
        rows: dict[str, Array],
        interval: tuple[Array, Array],
        phi: Array,
        guided: bool,
        limited: bool,
    ) -> Callable[[Array, Array], Array]:
        """(x, t) -> eps, for the labels and weights of `rows`."""

        def apply(x: Array, t: Array, y: Array) -> Any:
            prediction: Any = self.network.apply(params, x, t, y)
            return prediction[..., : self.shape[-1]]  # eps; a learned variance, behind it, is not used

        def plain(x: Array, t: Array) -> Array:
            return apply(x, t, rows["label"])

        def apply_weak(x: Array, t: Array, y: Array) -> Any:
            prediction: Any = self._weak_network.apply(others["weak"], x, t, y)
            return prediction[..., : self.shape[-1]]

        def with_guidance(x: Array, t: Array) -> Array:
            if others["weak"] is None:
                model = diffusion.classifier_free(apply, self.num_classes, phi=phi)
            else:
                model = diffusion.autoguided(apply, apply_weak, phi=phi)
            return model(x, t, rows["label"], rows["guidance"])

        if guided and limited:
            return diffusion.within(interval, with_guidance, plain)
        return with_guidance if guided else plain

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
        model = self._model(params, others, rows, interval, phi, guided, limited)
        keys = diffusion.sample_keys(key, rows["index"])
        x = diffusion.sample(model, plan, diffusion.initial_noise(keys, self.shape), keys, clip=clip)
        return self._to_images(x, others, parts)

    def _watch(
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
        steps: tuple[int, ...],
    ) -> tuple[UInt8[Array, "batch k h w 3"], UInt8[Array, "batch k h w 3"]]:
        model = self._model(params, others, rows, interval, phi, guided, limited)
        keys = diffusion.sample_keys(key, rows["index"])
        x = diffusion.initial_noise(keys, self.shape)
        after, x0 = diffusion.trajectory(model, plan, x, keys, num_steps=steps[-1] + 1, clip=clip)
        before = jnp.concatenate([x[None], after[:-1]])
        # The batch stays in front: it is what is split over the devices.
        frames = jnp.stack([before[jnp.array(steps)], x0[jnp.array(steps)]])  # [2, k, batch, ...]
        frames = jnp.moveaxis(frames, 2, 0)
        out = self._to_images(frames.reshape(-1, *self.shape), others, parts)
        out = out.reshape(*frames.shape[:3], *out.shape[1:])
        return out[:, 0], out[:, 1]

    def _to_images(self, x: Array, others: dict[str, Any], parts: tuple[int, int]) -> UInt8[Array, "batch h w 3"]:
        if others["decoder"] is not None:
            x = self._decode(others["decoder"], self._whitening.unwhiten(x), *parts)
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
