"""The variational bound on the likelihood of validation images, in bits per dimension."""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxdiff import diffusion, images
from jaxdiff import mesh as meshes
from jaxdiff.build import build_autoencoder
from jaxdiff.clock import Stopwatch
from jaxdiff.data.sources import Source
from jaxdiff.evaluation.records import Record
from jaxdiff.generator import Generator
from jaxdiff.keys import named_key
from jaxdiff.mesh import say


def likelihood_record(
    generator: Generator, params: Any, settings: Any, val: Source, num: int, protocol: dict[str, Any]
) -> Record:
    """The record of the bound over `num` (0 = all) validation images, always the same ones, all T terms of each at one
    draw.

    In pixels the last term is the likelihood of 8-bit values. Latents have none: there it is a KL as the others are,
    and the bound says how well latents are modelled, not images. Args: settings, the fields `sample`: seed, batch_size,
    and clip, of predictions of x_0 in pixels; protocol, what the parameters are.
    """
    assert isinstance(generator.process, diffusion.Schedule)
    mesh, watch = generator.mesh, Stopwatch()
    run = jax.jit(functools.partial(_bound, generator, clip=settings.clip))
    num = min(num or len(val), len(val))
    # Drawn from all of them: they come class by class.
    chosen = np.sort(np.random.default_rng(0).permutation(len(val))[:num])
    size = -(-min(settings.batch_size, num) // mesh.size) * mesh.size
    key = named_key(settings.seed, "likelihood")
    bits = []
    with watch.part("likelihood"):
        for first in range(0, num, size):
            index = chosen[first : first + size]
            batch = {name: value for name, value in val.batch(index).items() if name in ("image", "label")}
            batch = {**batch, "index": index.astype(np.int32)}
            rows = {
                name: np.concatenate([v, np.repeat(v[-1:], size - len(index), axis=0)]) for name, v in batch.items()
            }
            out = meshes.to_host(
                run(params, generator.decoder and generator.decoder.params, key, meshes.put_batch(rows, mesh))
            )
            bits.append(np.stack([out.total, out.prior], axis=-1)[: len(index)])
            say(f"likelihood of {first + len(index):,} of {num:,} images")
    total, prior = np.concatenate(bits).astype(np.float64).mean(axis=0)
    where = "" if generator.decoder is None else "latent_"
    variance = "learned" if generator.config.model.learned_variance else "posterior's"
    return {
        "scores": {f"{where}bits_per_dim": float(total), f"{where}bits_per_dim_prior": float(prior)},
        "floor": {},
        "protocol": {
            "num": num,
            "images": f"validation images' {'likelihood' if not where else 'latents'}",
            "bound": f"all {len(generator.process.betas)} terms, {variance} variance, clip {settings.clip}",
            "checksum": val.checksum,
            **protocol,
        },
        "seconds": watch.seconds,
        "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "pictures": {},
    }


def _bound(
    generator: Generator, params: Any, decoder: Any, key: Array, rows: dict[str, Array], *, clip: bool
) -> diffusion.Likelihood:
    d, process = generator.config.diffusion, generator.process
    assert isinstance(process, diffusion.Schedule)
    keys = diffusion.sample_keys(key, rows["index"])
    x0 = images.to_unit(rows["image"])
    if generator.decoder is not None:
        posterior: Any = build_autoencoder(generator.config).apply(decoder, x0, method="encode")
        x0 = generator.decoder.whitening.whiten(posterior.sample(diffusion.initial_noise(keys, generator.shape)))
    apply, kind = generator.apply_fn(generator.network, params), diffusion.PREDICTIONS[d.prediction]

    def model(x: Array, t: Array) -> tuple[Array, Array | None]:
        a, s = process.levels(t, x.ndim)
        out = apply(kind.input_scale(a, s, d.sigma_data) * x, t, rows["label"])
        learned = isinstance(out, diffusion.Output)
        target = kind.target(a, s, d.sigma_data)
        pred_x0 = diffusion.to_x0(target, a, s, x, out.prediction if learned else out)
        return pred_x0, diffusion.learned_fraction(out.variance) if learned else None

    def noise(t: Array) -> Array:
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, t), generator.shape))(keys)

    discrete = generator.decoder is None
    return diffusion.likelihood_bound(process, model, x0, noise, discrete=discrete, clip=clip)
