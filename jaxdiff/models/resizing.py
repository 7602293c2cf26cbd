"""How images come to InceptionV3: two ways of resizing, which give different scores of the same images."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxdiff.models.inception import SIZE


class Resize(NamedTuple):
    """uint8 images of any size -> what the network takes, and what a protocol says of it."""

    words: str
    function: Callable[[UInt8[Array, "batch h w 3"]], Float[Array, "batch 299 299 3"]]


def as_pytorch_fid(image: UInt8[Array, "batch h w 3"]) -> Float[Array, "batch 299 299 3"]:
    """Bilinear between centres of pixels and without antialiasing, of [0, 1]; then 2 x - 1."""
    return 2 * _resized(image / jnp.float32(255), half=0.5) - 1


def as_tf1(image: UInt8[Array, "batch h w 3"]) -> Float[Array, "batch 299 299 3"]:
    """As the graph of 2015 does it itself: bilinear between corners of pixels, of [0, 255]; then (x - 128) / 128."""
    return (_resized(image.astype(jnp.float32), half=0.0) - 128) / 128


def _resized(image: Float[Array, "batch h w 3"], half: float) -> Float[Array, "batch 299 299 3"]:
    rows, columns = (jnp.asarray(interpolation(n, SIZE, half), jnp.float32) for n in image.shape[1:3])
    narrow = jnp.einsum("bhwc,pw->bhpc", image, columns, precision="highest")
    return jnp.einsum("oh,bhpc->bopc", rows, narrow, precision="highest")


def interpolation(n: int, size: int, half: float) -> Float[np.ndarray, "size n"]:
    """The matrix that interpolates n pixels linearly at (i + half) n / size - half, i < size, held at the ends."""
    at = np.clip((np.arange(size) + half) * n / size - half, 0, n - 1)
    low = np.floor(at).astype(int)
    matrix = np.zeros((size, n))
    matrix[np.arange(size), low] = 1 - (at - low)
    matrix[np.arange(size), np.minimum(low + 1, n - 1)] += at - low
    return matrix


RESIZES: Mapping[str, Resize] = {
    "pytorch": Resize(
        "bilinear to 299 as pytorch-fid's (half-pixel centres, not antialiased), 2 x - 1", as_pytorch_fid
    ),
    "tf1": Resize("bilinear to 299 as TensorFlow 1 (no half-pixel centres), (x - 128) / 128", as_tf1),
}
