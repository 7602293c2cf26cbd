"""Distances between images in the features of a network: LPIPS on VGG-16, and its like on EfficientNet-Lite0."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxdiff.errors import ConfigError
from jaxdiff.models import efficientnet
from jaxdiff.models.layers import Dtype
from jaxdiff.state_dicts import read_state_dict

Images = Float[Array, "batch h w 3"]
# Convolutions of VGG-16 up to each of the five maps that LPIPS compares, by torchvision's numbers.
VGG_SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
LPIPS_MEAN, LPIPS_STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Perceptual(NamedTuple):
    """A distance `distance(params, a, b, dtype)` [B] of images in [-1, 1], under the name it is reported by."""

    name: str
    params: Any
    distance: Callable[[Any, Images, Images, Dtype], Float[Array, " batch"]]


def load_perceptual(lpips: str) -> Perceptual:
    """LPIPS with the weights in the file `lpips`, or, where that is "", the distance on EfficientNet-Lite0.

    Raises: ConfigError naming the file, or the package that is not installed.
    """
    if lpips:
        return Perceptual("lpips_vgg", load_lpips(pathlib.Path(lpips)), lpips_distance)
    return Perceptual("effnet_lite0_distance", efficientnet.load(), effnet_distance)


def load_lpips(path: pathlib.Path) -> dict[str, Any]:
    """The parameters of LPIPS: "convs", lists of `efficientnet.Conv`, and "lins", weights of channels.

    `path` is the state dict of the lpips package's LPIPS(net="vgg"), as saved by torch.save or as safetensors.
    Raises: ConfigError naming tensors that are missing or of another shape.
    """
    tensors = read_state_dict(path, "config.autoencoder.lpips")
    lacking: list[str] = []

    def take(name: str, ndim: int) -> Any:
        value = tensors.get(name)
        if value is None or value.ndim != ndim:
            lacking.append(name)
        return value

    def conv(name: str) -> tuple[Any, Any]:
        return take(f"{name}.weight", 4), take(f"{name}.bias", 1)

    convs = [[conv(f"net.slice{i}.{n}") for n in numbers] for i, numbers in enumerate(VGG_SLICES, 1)]
    lins = [take(f"lin{i}.model.1.weight", 4) for i in range(len(VGG_SLICES))]
    if lacking:
        raise ConfigError(f"config.autoencoder.lpips = {str(path)!r}: misses {', '.join(lacking)} of LPIPS(net='vgg')")
    turned = [[efficientnet.Conv(kernel.transpose(2, 3, 1, 0), bias) for kernel, bias in part] for part in convs]
    return {"convs": turned, "lins": [lin[0, :, 0, 0] for lin in lins]}


def lpips_distance(params: dict[str, Any], a: Images, b: Images, dtype: Dtype = jnp.float32) -> Float[Array, " batch"]:
    """LPIPS v0.1 of images in [-1, 1]: sum over five maps of the mean over positions of sum_c w_c (a_c - b_c)^2,
    with a, b the maps at unit length. Source: Zhang et al. 2018 (arXiv 1801.03924), eq. 1."""
    mean, std = (efficientnet.per_channel(values, jnp.float32) for values in (LPIPS_MEAN, LPIPS_STD))
    maps = [_vgg_maps(params["convs"], ((x - mean) / std).astype(dtype)) for x in (a, b)]
    return sum((_compare(x, y, w) for x, y, w in zip(*maps, params["lins"], strict=True)), jnp.zeros(len(a)))


def effnet_distance(params: dict[str, Any], a: Images, b: Images, dtype: Dtype = jnp.float32) -> Float[Array, " batch"]:
    """The same on five maps of EfficientNet-Lite0, at the images' own size, all channels and maps with equal weight.

    The mean over maps, as in LPIPS without its learnt weights: 0 for equal images, at most 4.
    """
    maps = [efficientnet.apply(params, x, dtype).maps for x in (a, b)]
    return sum((_compare(x, y, 1.0) for x, y in zip(*maps, strict=True)), jnp.zeros(len(a))) / len(maps[0])


def _compare(a: Array, b: Array, weight: Any) -> Float[Array, " batch"]:
    def unit(x: Array) -> Array:
        return x / (jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12) + 1e-10)

    return (jnp.square(unit(a) - unit(b)) * efficientnet.per_channel(weight, a.dtype)).sum(-1).mean((1, 2))


def _vgg_maps(convs: list[list[efficientnet.Conv]], x: Array) -> list[Array]:
    maps = []
    for i, part in enumerate(convs):
        if i:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for conv in part:
            kernel = jnp.asarray(conv.kernel, x.dtype)
            x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jnp.maximum(x + efficientnet.per_channel(conv.bias, x.dtype), 0)
        maps.append(x.astype(jnp.float32))
    return maps
