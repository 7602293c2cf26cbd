"""InceptionV3 as the FID has it: the graph of 2015-12-05, whose features and logits FID, sFID and IS are defined on.

Its weights cannot be shipped; they are read from a state dict as pytorch-fid's. Unlike later versions, average pooling
does not count the padding, the last block pools by the maximum, and there are 1008 classes.
Source: Szegedy et al. 2015 (arXiv 1512.00567), table 1; Heusel et al. 2017 (arXiv 1706.08500).
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from jaxdiff.errors import ConfigError
from jaxdiff.models import efficientnet
from jaxdiff.state_dicts import read_state_dict

SIZE = 299  # pixels that it was trained at
CLASSES = 1008
KNOWN, KNOWN_SHA256 = "pt_inception-2015-12-05", "6726825d"  # pytorch-fid's file of weights; its SHA-256 begins so
SPATIAL = 7  # channels of the 1x1 branch of mixed_6 that make the features of sFID


class Conv(NamedTuple):
    """A convolution to `out` channels, batch normalisation and ReLU."""

    name: str
    out: int
    height: int
    width: int
    stride: int = 1
    padding: str = "SAME"


class Pool(NamedTuple):
    """Pooling over 3x3 pixels."""

    of: Callable[[Array], Array]


class Fork(NamedTuple):
    """Branches of what comes in, put side by side along the channels."""

    name: str
    branches: tuple[tuple["Step", ...], ...]


Step = Conv | Pool | Fork
MEAN = Pool(lambda x: nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False))
MAX = Pool(lambda x: nn.max_pool(x, (3, 3), padding="SAME"))
HALF = Pool(lambda x: nn.max_pool(x, (3, 3), (2, 2)))


def _chain(name: str, *convs: tuple[int, int, int]) -> tuple[Step, ...]:
    """Convolutions name_1, name_2, ... of (channels, height, width)."""
    return tuple(Conv(f"{name}_{i}", *conv) for i, conv in enumerate(convs, 1))


def _a(name: str, pooled: int) -> Fork:
    five, three = ((48, 1, 1), (64, 5, 5)), ((64, 1, 1), (96, 3, 3), (96, 3, 3))
    ends = Conv("branch1x1", 64, 1, 1), Conv("branch_pool", pooled, 1, 1)
    return Fork(name, ((ends[0],), _chain("branch5x5", *five), _chain("branch3x3dbl", *three), (MEAN, ends[1])))


def _c(name: str, n: int) -> Fork:
    seven = (n, 1, 1), (n, 1, 7), (192, 7, 1)
    double = (n, 1, 1), (n, 7, 1), (n, 1, 7), (n, 7, 1), (192, 1, 7)
    ends = Conv("branch1x1", 192, 1, 1), Conv("branch_pool", 192, 1, 1)
    return Fork(name, ((ends[0],), _chain("branch7x7", *seven), _chain("branch7x7dbl", *double), (MEAN, ends[1])))


def _e(name: str, pool: Pool) -> Fork:
    def both(conv: str) -> Fork:
        return Fork("", ((Conv(f"{conv}a", 384, 1, 3),), (Conv(f"{conv}b", 384, 3, 1),)))

    double = *_chain("branch3x3dbl", (448, 1, 1), (384, 3, 3)), both("branch3x3dbl_3")
    single = Conv("branch3x3_1", 384, 1, 1), both("branch3x3_2")
    return Fork(name, ((Conv("branch1x1", 320, 1, 1),), single, double, (pool, Conv("branch_pool", 192, 1, 1))))


def _halved(name: str, out: int) -> Conv:
    return Conv(name, out, 3, 3, 2, "VALID")


NETWORK: tuple[Step, ...] = (
    _halved("Conv2d_1a_3x3", 32),
    Conv("Conv2d_2a_3x3", 32, 3, 3, padding="VALID"),
    Conv("Conv2d_2b_3x3", 64, 3, 3),
    HALF,
    Conv("Conv2d_3b_1x1", 80, 1, 1),
    Conv("Conv2d_4a_3x3", 192, 3, 3, padding="VALID"),
    HALF,
    _a("Mixed_5b", 32),
    _a("Mixed_5c", 64),
    _a("Mixed_5d", 64),
    Fork(
        "Mixed_6a",
        (
            (_halved("branch3x3", 384),),
            (*_chain("branch3x3dbl", (64, 1, 1), (96, 3, 3)), _halved("branch3x3dbl_3", 96)),
            (HALF,),
        ),
    ),
    _c("Mixed_6b", 128),
    _c("Mixed_6c", 160),
    _c("Mixed_6d", 160),  # mixed_6 of the graph
    _c("Mixed_6e", 192),
    Fork(
        "Mixed_7a",
        (
            (Conv("branch3x3_1", 192, 1, 1), _halved("branch3x3_2", 320)),
            (*_chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1)), _halved("branch7x7x3_4", 192)),
            (HALF,),
        ),
    ),
    _e("Mixed_7b", MEAN),
    _e("Mixed_7c", MAX),
)


class Outputs(NamedTuple):
    """What the network says of images, float32: pooled features, logits without bias, features of sFID, maps."""

    pooled: Float[Array, "batch 2048"]
    logits: Float[Array, "batch 1008"]
    spatial: Float[Array, "batch 2023"]
    maps: dict[str, Float[Array, "batch h w c"]]  # of the blocks, by torch's names


def load(path: pathlib.Path, flag: str) -> dict[str, Any]:
    """The parameters in a state dict (.pth or .safetensors): convolutions by name, and "fc"; numpy, float32.

    Raises: ConfigError beginning with `flag`, naming tensors that are missing, misshapen or of another network.
    """
    tensors, expected = read_state_dict(path, flag), shapes()
    counters = {name.replace(".weight", ".num_batches_tracked") for name in expected if name.endswith(".bn.weight")}
    wrong = {
        "misses": [name for name in expected if name not in tensors],
        "has another shape of": [
            f"{name} {list(tensors[name].shape)}, not {list(shape)}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
        "has besides": [name for name in tensors if name not in expected and name not in counters],
    }
    if any(wrong.values()):
        words = "; it ".join(f"{what} {_some(names)}" for what, names in wrong.items() if names)
        raise ConfigError(f"{flag} = {str(path)!r} is not the FID's InceptionV3: it {words}")
    names = [name.removesuffix(".conv.weight") for name in expected if name.endswith(".conv.weight")]
    convs = {name: efficientnet.fold(tensors, f"{name}.conv", f"{name}.bn") for name in names}
    return {**convs, "fc": tensors["fc.weight"].T}


def apply(params: dict[str, Any], image: Float[Array, "batch 299 299 3"], dtype: Any = jnp.float32) -> Outputs:
    """Features and logits of images in [-1, 1], of 299 pixels. Args: params, as from `load`; dtype, of the computation.

    The features of sFID are those that OpenAI's evaluator of ADM takes: the first 7 channels of the 1x1 branch of
    mixed_6 (Mixed_6d), after its ReLU, at all 17x17 positions.
    """
    spatial: list[Array] = []

    def conv(name: str, step: Conv, x: Array) -> Array:
        y = _conv(params[name], step, x)
        if name == "Mixed_6d.branch1x1":
            spatial.append(y[..., :SPATIAL].reshape(len(y), -1).astype(jnp.float32))
        return y

    x, maps = image.astype(dtype), {}
    for step in NETWORK:
        x = _run((step,), x, conv)
        if isinstance(step, Fork):
            maps[step.name] = x.astype(jnp.float32)
    pooled = maps["Mixed_7c"].mean(axis=(1, 2))
    return Outputs(pooled, pooled @ params["fc"], spatial[0], maps)


def _run(steps: tuple[Step, ...], x: Array, conv: Callable[[str, Conv, Array], Array], prefix: str = "") -> Array:
    for step in steps:
        if isinstance(step, Conv):
            x = conv(prefix + step.name, step, x)
        elif isinstance(step, Pool):
            x = step.of(x)
        else:
            inner = f"{prefix}{step.name}." if step.name else prefix
            x = jnp.concatenate([_run(branch, x, conv, inner) for branch in step.branches], axis=-1)
    return x


def _conv(conv: efficientnet.Conv, step: Conv, x: Array) -> Array:
    kernel, strides, numbers = jnp.asarray(conv.kernel, x.dtype), (step.stride, step.stride), ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, kernel, strides, step.padding, dimension_numbers=numbers)
    return jnp.maximum(y + efficientnet.per_channel(conv.bias, x.dtype), 0)


@functools.cache
def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the network needs, found by running it on nothing."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (CLASSES, 2048), "fc.bias": (CLASSES,)}

    def conv(name: str, step: Conv, x: Array) -> Array:
        kernel = (step.height, step.width, x.shape[-1], step.out)
        shapes[f"{name}.conv.weight"] = tuple(kernel[i] for i in (3, 2, 0, 1))
        shapes.update({f"{name}.bn.{part}": (step.out,) for part in ("weight", "bias", "running_mean", "running_var")})
        return _conv(efficientnet.Conv(jnp.zeros(kernel), jnp.zeros(step.out)), step, x)

    jax.eval_shape(lambda x: _run(NETWORK, x, conv), jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32))
    return shapes


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
