"""What is lost in an autoencoder's latents. A new score is one function and one line in `SCORES`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxdiff import images
from jaxdiff import mesh as meshes
from jaxdiff.data import device_batches, eval_batches
from jaxdiff.data.sources import Source
from jaxdiff.evaluation.frechet import Moments, frechet_distance
from jaxdiff.models import AutoencoderKL, efficientnet

BATCH = 32  # images at a time on a device


def rfd_effnet_lite0(model: AutoencoderKL, params: Any, source: Source, mesh: Mesh) -> dict[str, float]:
    """{"rfd_effnet_lite0": Frechet distance between the images of `source` and their reconstructions, "rfd_images": of
    how many}.

    Features are those of EfficientNet-Lite0 at 224 pixels, so that it is no rFID, for which they are InceptionV3's.
    Decoded is the mean of the posterior, rounded to 8 bits.
    """
    frozen = meshes.put_replicated(efficientnet.load(), mesh)

    @jax.jit
    def features(params: Any, frozen: Any, batch: Any) -> Any:
        image = images.to_unit(batch)
        posterior: Any = model.apply(params, image, method="encode")
        decoded: Any = model.apply(params, posterior.mean, method="decode")
        decoded = images.to_unit(images.to_uint8(decoded))
        return [efficientnet.apply(frozen, efficientnet.resized(x)).features for x in (image, decoded)]

    index, count = jax.process_index(), jax.process_count()
    batches = eval_batches(source, batch_size=BATCH * mesh.size, process_index=index, process_count=count)
    moments = Moments(), Moments()
    for batch in device_batches(batches, meshes.batch_sharding(mesh)):
        weight = meshes.to_host(batch["weight"])
        for side, rows in zip(moments, meshes.to_host(features(params, frozen, batch["image"])), strict=True):
            side.add(np.asarray(rows)[weight > 0])
    return {"rfd_effnet_lite0": frechet_distance(*moments), "rfd_images": moments[0].count}


SCORES: Mapping[str, Callable[..., dict[str, float]]] = {"rfd_effnet_lite0": rfd_effnet_lite0}
