"""The compiled sampler: images from the parameters of a network."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Int32, UInt8
from ml_collections import ConfigDict

from jaxdiff import diffusion, images
from jaxdiff import mesh as meshes
from jaxdiff.build import build_autoencoder, build_network, build_plan, build_process
from jaxdiff.config.fields import guidance_weights
from jaxdiff.data.latents import Whitening
from jaxdiff.keys import named_key
from jaxdiff.models import Network, decode_in_parts, decode_tiled, forms
from jaxdiff.packing import Packing, pack, unpack


class Decoder(NamedTuple):
    """From whitened latents to images: the autoencoder's parameters and the latents' statistics."""

    params: Any
    whitening: Whitening


class Weak(NamedTuple):
    """The weaker model of autoguidance."""

    network: Network
    params: Any


class Asked(NamedTuple):
    """What is drawn, all of it traced: the sampler's plan, the seed, and guidance's interval and rescaling."""

    plan: diffusion.Plan
    seed: Int[Array, ""] | np.int32
    interval: tuple[Any, Any]
    phi: Any


class Rows(NamedTuple):
    """Of each image its number, its class and the weight of guidance."""

    number: Int[Array, " n"]
    label: Int[Array, " n"]
    guidance: Float[Array, " n"]


def table_of(number: Any, label: Any, guidance: Any) -> Int32[np.ndarray, "n 3"]:
    """`Rows` as one array."""
    return np.stack([np.asarray(number, np.int32), np.asarray(label, np.int32), np.float32(guidance).view(np.int32)], 1)


def rows_of(table: Int32[Array, "n 3"]) -> Rows:
    """The inverse of `table_of`."""
    return Rows(table[:, 0], table[:, 1], jax.lax.bitcast_convert_type(table[:, 2], jnp.float32))


class Generator:
    """Draws images from the parameters of a network, guided by the null class or by a weak model.

    Timesteps, coefficients, eta, and the guidance's weight, interval and rescaling are traced: only the batch size,
    clipping, the parts of decoding, whether there is guidance, or an interval of it, and whether the evaluations are a
    multiple of ten make another program. Image k is a function of (seed, k) and its label.
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
        self.config = config
        self.process = build_process(config)
        self.network = build_network(config, self.shape[-1], num_classes)
        self.decoder = decoder
        self._others = {"decoder": decoder and decoder.params, "weak": weak and weak.params}  # traced as well
        if decoder is not None:
            self._autoencoder = build_autoencoder(config)
            self._whitening = decoder.whitening
        if weak is not None:
            self._weak_network = weak.network
        static = ("packing", "guided", "limited", "clip", "parts")
        self._run = jax.jit(self._draw, static_argnames=(*static, "together"))
        self._run_watched = jax.jit(
            self._watch, static_argnames=(*static, "steps"), out_shardings=meshes.batch_sharding(mesh)
        )

    def abstract_params(self) -> Any:
        """Shapes and shardings of the network's parameters."""
        x, one = jnp.zeros((1, *self.shape)), jnp.zeros((1,), jnp.int32)
        tree = forms.abstract_init(self.network, x, one, one)
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
        plan = build_plan(self.config, settings)
        weights, n = guidance_weights(settings), len(labels)
        number, label = np.tile(np.arange(n), len(weights)), np.tile(np.asarray(labels), len(weights))
        rows = table_of(number, label, np.repeat(weights, n))
        # Every batch has the same size, so that there is one program and image k does not depend on n.
        size = -(-settings.batch_size // self.mesh.size) * self.mesh.size
        rows = np.pad(rows, ((0, -len(rows) % size), (0, 0)), mode="edge")
        asked, flags = self._asked(plan, settings)
        flags["together"] = diffusion.evaluations_together(plan)
        out = []
        for first in range(0, len(rows), size):
            batch = meshes.put_batch(rows[first : first + size], self.mesh)
            out.append(meshes.to_host(self._run(params, self._others, asked, batch, **flags)))
        samples = np.concatenate(out)[: len(weights) * n]
        return samples.reshape(len(weights), n, *samples.shape[1:])

    def denoising(
        self, params: Any, settings: ConfigDict, labels: Int[np.ndarray, " n"], frames: int = 8
    ) -> dict[str, np.ndarray]:
        """How images 0..n-1 come about: "t" [k], and uint8 [k, n, h, w, 3] of as many steps evenly chosen, "x_t" before
        the step and "x0" that is predicted in it, both decoded where they are latents; at the first weight."""
        plan = build_plan(self.config, settings)
        n, w = len(labels), guidance_weights(settings)[0]
        rows = table_of(np.arange(n), labels, np.full(n, w))
        rows = np.pad(rows, ((0, -n % self.mesh.size), (0, 0)), mode="edge")
        steps = tuple(int(i) for i in np.unique(np.linspace(0, int(plan.num_steps) - 1, frames).round()))
        asked, flags = self._asked(plan, settings)
        batch = meshes.put_batch(rows, self.mesh)
        x_t, x0 = meshes.to_host(self._run_watched(params, self._others, asked, batch, steps=steps, **flags))
        return {
            "t": np.asarray(plan.rows.time)[list(steps)],
            "x_t": x_t[:n].swapaxes(0, 1),
            "x0": x0[:n].swapaxes(0, 1),
        }

    def _asked(self, plan: diffusion.Plan, settings: ConfigDict) -> tuple[Array, dict[str, Any]]:
        """What is asked for, packed, and what makes another program."""
        low, high = map(np.float32, settings.guidance_interval or (0, 0))
        seed = np.int64(settings.seed).astype(np.int32)  # as jax.random.key takes it
        packed, packing = pack(Asked(plan, seed, (low, high), np.float32(settings.guidance_rescale)))
        return meshes.put_replicated(packed, self.mesh), {
            "packing": packing,
            "guided": any(guidance_weights(settings)),
            "limited": bool(settings.guidance_interval),
            "clip": settings.clip,
            "parts": (settings.decode_batch, settings.decode_tile),
        }

    def apply_fn(self, network: Network, params: Any) -> Callable[[Array, Array, Array], Any]:
        """(x, t, y) -> prediction, with the variance that is learned beside it."""
        channels = self.shape[-1]
        network = network.clone(remat="none")  # nothing is kept here, and `hoist` does not see into remat's blocks

        def apply(x: Array, t: Array, y: Array) -> Any:
            out: Any = network.apply(params, x, self.process.network_time(t), y)
            return diffusion.Output(out[..., :channels], out[..., channels:]) if out.shape[-1] > channels else out

        return apply

    def _model(
        self, params: Any, others: dict[str, Any], asked: Asked, rows: Rows, guided: bool, limited: bool
    ) -> Callable[[Array, Array], Any]:
        """(x, t) -> prediction, for the labels and weights that are asked for."""
        apply = self.apply_fn(self.network, params)

        def plain(x: Array, t: Array) -> Any:
            return apply(x, t, rows.label)

        def with_guidance(x: Array, t: Array) -> Any:
            if others["weak"] is None:
                model = diffusion.classifier_free(apply, self.num_classes, phi=asked.phi)
            else:
                weak = self.apply_fn(self._weak_network, others["weak"])
                model = diffusion.autoguided(apply, weak, phi=asked.phi)
            return model(x, t, rows.label, rows.guidance)

        if guided and limited:
            return diffusion.within(asked.interval, with_guidance, plain)
        return with_guidance if guided else plain

    def _draw(
        self,
        params: Any,
        others: dict[str, Any],
        packed: Array,
        table: Array,
        *,
        packing: Packing,
        guided: bool,
        limited: bool,
        clip: bool,
        parts: tuple[int, int],
        together: int,
    ) -> UInt8[Array, "batch h w 3"]:
        asked, rows = unpack(packed, packing), rows_of(table)
        model = self._model(params, others, asked, rows, guided, limited)
        keys = diffusion.sample_keys(named_key(asked.seed, "sample"), rows.number)
        x = diffusion.initial_noise(keys, self.shape)
        x = diffusion.sample(model, asked.plan, x, keys, clip=clip, together=together)
        return self._to_images(x, others, parts)

    def _watch(
        self,
        params: Any,
        others: dict[str, Any],
        packed: Array,
        table: Array,
        *,
        packing: Packing,
        guided: bool,
        limited: bool,
        clip: bool,
        parts: tuple[int, int],
        steps: tuple[int, ...],
    ) -> tuple[UInt8[Array, "batch k h w 3"], UInt8[Array, "batch k h w 3"]]:
        asked, rows = unpack(packed, packing), rows_of(table)
        model = self._model(params, others, asked, rows, guided, limited)
        keys = diffusion.sample_keys(named_key(asked.seed, "sample"), rows.number)
        x = diffusion.initial_noise(keys, self.shape)
        after, x0 = diffusion.trajectory(model, asked.plan, x, keys, num_steps=steps[-1] + 1, clip=clip)
        before = jnp.concatenate([asked.plan.initial_scale * x[None], after[:-1]])
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
