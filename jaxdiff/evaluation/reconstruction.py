"""What is lost in an autoencoder's latents. A new score is one function and one line in `SCORES`."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxdiff import images
from jaxdiff import mesh as meshes
from jaxdiff.data import every_row
from jaxdiff.data.sources import Source
from jaxdiff.evaluation.frechet import Moments, frechet_distance
from jaxdiff.models import AutoencoderKL, efficientnet, perceptual

BATCH = 32  # images at a time on a device


def rfd_effnet_lite0(model: AutoencoderKL, params: Any, source: Source, mesh: Mesh) -> dict[str, float]:
    """{"rfd_effnet_lite0": Frechet distance between the images of `source` and their reconstructions, "rfd_images": of
    how many}.

    Features are those of EfficientNet-Lite0 at 224 pixels, so that it is no rFID, for which they are InceptionV3's.
    """

    def features(frozen: Any, image: Array, decoded: Array) -> list[Array]:
        return [efficientnet.apply(frozen, efficientnet.resized(x)).features for x in (image, decoded)]

    moments = Moments(), Moments()
    for part in _compare(features, efficientnet.load(), model, params, source, mesh):
        for side, rows in zip(moments, part, strict=True):
            side.add(rows)
    return {"rfd_effnet_lite0": frechet_distance(*moments), "rfd_images": moments[0].count}


def effnet_lite0_distance(model: AutoencoderKL, params: Any, source: Source, mesh: Mesh) -> dict[str, float]:
    """{"effnet_lite0_distance": mean of `perceptual.effnet_distance` between the images and their reconstructions}."""

    def distance(frozen: Any, image: Array, decoded: Array) -> list[Array]:
        return [perceptual.effnet_distance(frozen, image, decoded)]

    parts = [part for (part,) in _compare(distance, efficientnet.load(), model, params, source, mesh)]
    return {"effnet_lite0_distance": float(np.concatenate(parts).mean(dtype=np.float64))}


def _compare(
    function: Callable[[Any, Array, Array], list[Array]],
    frozen: Any,
    model: AutoencoderKL,
    params: Any,
    source: Source,
    mesh: Mesh,
) -> Iterator[list[np.ndarray]]:
    """Rows of function(frozen, images, decoded) for all images of `source`, where decoded is the mean of the posterior,
    rounded to 8 bits."""
    frozen = meshes.put_replicated(frozen, mesh)

    @jax.jit
    def run(params: Any, frozen: Any, batch: Any) -> list[Array]:
        image = images.to_unit(batch)
        posterior: Any = model.apply(params, image, method="encode")
        decoded: Any = model.apply(params, posterior.mean, method="decode")
        with jax.default_matmul_precision("highest"):  # as the features of all scores are
            return function(frozen, image, images.to_unit(images.to_uint8(decoded)))

    for batch in every_row(source, mesh, batch_size=BATCH * mesh.size):
        keep = meshes.to_host(batch["weight"]) > 0
        yield [rows[keep] for rows in meshes.to_host(run(params, frozen, batch["image"]))]


SCORES: Mapping[str, Callable[..., dict[str, float]]] = {
    "rfd_effnet_lite0": rfd_effnet_lite0,
    "effnet_lite0_distance": effnet_lite0_distance,
}
