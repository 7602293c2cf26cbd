"""Pixels: between uint8 and [-1, 1], grids, and image files."""

import pathlib
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image


def to_unit(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """uint8 in 0..255 -> float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def mirrored(batch: Mapping[str, Array]) -> UInt8[Array, "batch h w 3"]:
    """The images of a batch, those mirrored left to right that its "mirror" (if there is one) says."""
    image = batch["image"]
    if "mirror" in batch:
        image = jnp.where(batch["mirror"][:, None, None, None], image[:, :, ::-1], image)
    return image


def from_batch(batch: Mapping[str, Array]) -> Float[Array, "batch h w 3"]:
    """The images of a batch, mirrored as it says, in [-1, 1]."""
    return to_unit(mirrored(batch))


def to_uint8(images: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Float in [-1, 1] (clipped) -> uint8 in 0..255, rounded to nearest."""
    return jnp.round((jnp.clip(images, min=-1, max=1) + 1) * 127.5).astype(jnp.uint8)


def psnr(a: Float[Array, "batch h w c"], b: Float[Array, "batch h w c"]) -> Float[Array, " batch"]:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], 10 log10(2^2 / mean squared error), per image."""
    error = jnp.square(a - b).mean(axis=(1, 2, 3))
    return 10 * jnp.log10(4 / jnp.maximum(error, 1e-10))


def ssim(a: Float[Array, "batch h w c"], b: Float[Array, "batch h w c"]) -> Float[Array, " batch"]:
    """Structural similarity of images in [-1, 1], per image: the mean over channels and over the positions of a
    Gaussian window of 11x11 pixels (less for smaller images) and deviation 1.5 that lies within the image.

    Source: Wang et al. 2004, "Image quality assessment", eq. 13, with K1 = 0.01 and K2 = 0.03.
    """
    width = min(11, *(n - 1 + n % 2 for n in a.shape[1:3]))
    window = np.exp(-((np.arange(width) - width // 2) ** 2) / (2 * 1.5**2))
    window = window / window.sum()

    def averaging(size: int) -> Float[Array, "size positions"]:
        columns = [np.pad(window, (k, size - width - k)) for k in range(size - width + 1)]
        return jnp.asarray(np.stack(columns, axis=1), jnp.float32)

    rows, columns = (averaging(n) for n in a.shape[1:3])

    def local_mean(x: Array) -> Array:
        # In full precision: variances are small differences of squares.
        return jnp.einsum("bhwc,hi,wj->bijc", x, rows, columns, precision="highest")

    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    value = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (value / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(axis=(1, 2, 3))


def grid(images: UInt8[np.ndarray, "n h w c"], columns: int, gap: int = 2) -> UInt8[np.ndarray, "H W c"]:
    """Images row by row on white, `columns` in a row, `gap` pixels apart."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), 255, np.uint8)
    for k, image in enumerate(images):
        top, left = k // columns * (h + gap), k % columns * (w + gap)
        sheet[top : top + h, left : left + w] = image
    return sheet


def side_by_side(*sheets: UInt8[np.ndarray, "h w c"], gap: int = 16) -> UInt8[np.ndarray, "h W c"]:
    """Sheets of one height next to each other on white."""
    white = np.full((sheets[0].shape[0], gap, sheets[0].shape[2]), 255, np.uint8)
    parts = [part for sheet in sheets for part in (white, sheet)]
    return np.concatenate(parts[1:], axis=1)


def save_png(path: pathlib.Path, image: UInt8[np.ndarray, "h w 3"]) -> pathlib.Path:
    """Write one PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(image)).save(path)
    return path


def fresh_path(path: pathlib.Path, beside: Sequence[str] = ()) -> pathlib.Path:
    """`path`, or its first numbered variant (-2, -3, ...) that does not exist yet: nothing is overwritten.

    Nor does any of its name with the endings `beside` in the place of its own.
    """
    stem, number = path.stem, 1
    while any(path.with_name(path.stem + ending).exists() for ending in (path.suffix, *beside)):
        number += 1
        path = path.with_name(f"{stem}-{number}{path.suffix}")
    return path
