"""3x3 convolutions with padding 1, as one operation with what is added to them: a bias, a map, products of others.

And by the same kernel, for the sums that it has of its results, those of upsampled maps and attention's last product.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxdiff.models import forms, norm
from jaxdiff.models.norm import Sums
from jaxdiff.models.products import HALF, add_products, product_gradients

LAYOUT = ("NHWC", "HWIO", "NHWC")
NAME = "convolution"  # of what the kernel returns, to policies of `jax.checkpoint`


class Box(NamedTuple):
    """Neighbouring positions of some images."""

    images: int
    height: int
    width: int

    @classmethod
    def of(cls, positions: int, height: int, width: int) -> Self | None:
        """The box of so many positions that images of this size are made of; None where they are not."""
        side = min(width, 32)
        if width % side or positions % side:
            return None
        rows = positions // side
        if side == width and rows > height:
            return cls(rows // height, height, width) if rows % height == 0 else None
        return cls(1, rows, side) if height % rows == 0 else None


class Cut(NamedTuple):
    """How the kernel is cut: each of a block's two warpgroups computes `rows` positions of the result and `columns`
    features.

    box: the positions of both. taps: below one another, that one piece of the map is read for. map_stages,
    kernel_stages: pieces of maps and of kernels that are in shared memory at once.
    """

    rows: int
    columns: int
    box: Box
    taps: int
    map_stages: int
    kernel_stages: int


class Added(NamedTuple):
    """What is added to a convolution: whether a bias, and a map; and the channels of maps that have kernels."""

    bias: bool
    residual: bool
    widths: tuple[int, ...]


def cut(shape: Sequence[int], features: int, side: int = 3) -> Cut | None:
    """That for maps of this shape and kernels of `side` taps, rows and columns; None where the kernel does not fit.

    Of 128 positions for a warpgroup, or of 64 where fewer multiprocessors are without work then.
    """
    batch, height, width, channels = shape
    if channels % 64 or features % 128 or Box.of(64, height, width) is None:
        return None
    best, found = 0.0, None
    for rows, worth in ((128, 1.0), (64, 0.85)):
        box = Box.of(2 * rows, height, width)
        if box is None or batch % box.images:
            continue
        tiles = batch * height * width // (2 * rows) * (features // 128) * (4 if side == 2 else 1)
        rounds = tiles / forms.multiprocessors()
        if rounds / math.ceil(rounds) * worth > best:
            best = rounds / math.ceil(rounds) * worth
            # Shared memory is read in eights of positions, of which a row has to have some to be a tap below another.
            taps = side if box.images == 1 and box.width % 8 == 0 else 1
            found = Cut(rows, 128, box, taps, 3 if box.images == 1 else 4, 4)
    return found


def has_sums(shape: Sequence[int]) -> bool:
    """Whether the kernel has sums of maps of this shape for norms: else a tile has several images."""
    return shape[1] * shape[2] >= 256


def has_kernel(x: Any, features: int, side: int = 3) -> bool:
    """Whether the convolution of x [B, H, W, C], or its shape, is a kernel of our own: in half precision, on Hopper.

    No interpreter runs it.
    """
    on_gpu = norm.has_kernel() and not norm.INTERPRET and forms.capability() == 9.0
    return on_gpu and x.dtype in HALF and cut(x.shape, features, side) is not None


def convolve_add(
    x: Float[Array, "batch h w c"],
    kernel: Float[Array, "3 3 c features"],
    bias: Float[Array, " features"] | None = None,
    residual: Float[Array, "batch h w features"] | None = None,
    parts: Sequence[Float[Array, "batch h w _"]] = (),
    kernels: Sequence[Float[Array, "_ features"]] = (),
) -> tuple[Float[Array, "batch h w features"], Sums | None]:
    """residual + (convolution + bias) + (sum of part @ kernel), and its sums for a norm, if they cost next to nothing.

    Args: x, residual, parts and kernels of one dtype, which is the result's; but the convolution's of any.
    """
    kernel = kernel.astype(x.dtype)
    wide = all(part.shape[-1] % 64 == 0 for part in parts)
    if wide and has_kernel(x, kernel.shape[-1]):
        y, *sums = convolve(True, x, kernel, bias, residual, tuple(parts), tuple(kernels))
        return checkpoint_name(y, NAME), sums[0] if sums else None
    if parts:
        residual = add_products(parts, kernels, residual=residual)
    return reference(x, kernel, bias, residual), None


def product_add(
    x: Float[Array, "batch h w c"],
    kernel: Float[Array, "c features"],
    bias: Float[Array, " features"],
    residual: Float[Array, "batch h w features"],
) -> tuple[Float[Array, "batch h w features"], Sums | None]:
    """residual + (x @ kernel + bias), and its sums for a norm, if they cost next to nothing; all but the bias of one
    dtype."""
    if has_sums(x.shape) and residual.dtype == x.dtype and has_kernel(x, kernel.shape[-1], side=1):
        y, *sums = convolve(True, x, kernel[None, None], bias, residual)
        return checkpoint_name(y, NAME), sums[0]
    return add_products([x], [kernel], bias, residual), None


def spread(
    x: Float[Array, "batch h w c"], kernel: Float[Array, "4 4 features c"]
) -> tuple[Float[Array, "batch 2*h 2*w features"], Sums | None]:
    """The transpose of a convolution of stride 2 with padding 1 by the kernel, and its sums as those of `convolve_add`.

    Of the result each second row begins with one of two pairs of taps, and each second column so: four kernels.
    """
    from jaxdiff.models import convolution_kernels  # Mosaic takes a second to import

    taps = kernel[::-1, ::-1].reshape(2, 2, 2, 2, *kernel.shape[2:])  # tap, which rows, tap, which columns
    y, *sums = convolution_kernels.convolve(True, x, taps.transpose(1, 3, 0, 2, 5, 4), None, None, (), ())
    return y, sums[0] if sums else None


def reference(
    x: Float[Array, "batch h w c"],
    kernel: Float[Array, "*taps c features"],
    bias: Float[Array, " features"] | None = None,
    residual: Float[Array, "batch h w features"] | None = None,
    parts: Sequence[Float[Array, "batch h w _"]] = (),
    kernels: Sequence[Float[Array, "_ features"]] = (),
) -> Float[Array, "batch h w features"]:
    """residual + (convolution + bias) + (sum of part @ kernel), left to XLA; of these cuDNN adds the first itself.

    Args: kernel [side, side, c, features], or as in `spread` [2, 2, 2, 2, c, features].
    """

    def convolution(kernel: Array, *padding: tuple[int, int]) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=LAYOUT)

    if kernel.ndim == 6:
        rows = [[convolution(kernel[i, j], (1 - i, i), (1 - j, j)) for j in range(2)] for i in range(2)]
        y = jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=2)  # [batch, h, 2, w, 2, features]
        y = y.reshape(len(x), 2 * x.shape[1], 2 * x.shape[2], -1)
    else:
        around = kernel.shape[0] // 2
        y = convolution(kernel, (around, around), (around, around))
    if bias is not None:
        y = norm.add_bias(y, bias)
    if residual is not None:
        y = residual + y
    return functools.reduce(jnp.add, [part @ kernel for part, kernel in zip(parts, kernels, strict=True)], y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(
    summed: bool,
    x: Float[Array, "batch h w c"],
    kernel: Float[Array, "side side c features"],
    bias: Float[Array, " features"] | None = None,
    residual: Float[Array, "batch h w features"] | None = None,
    parts: tuple[Float[Array, "batch h w _"], ...] = (),
    kernels: tuple[Float[Array, "_ features"], ...] = (),
) -> tuple[Array, ...]:
    """`reference` by the kernel of `jaxdiff.models.convolution_kernels`, rounded once; and if `summed`, maybe its sums.

    Those are constants to whoever differentiates.
    """
    from jaxdiff.models import convolution_kernels  # Mosaic takes a second to import

    return tuple(convolution_kernels.convolve(summed, x, kernel, bias, residual, parts, kernels))


def _forward(summed: bool, *inputs: Any) -> Any:
    return convolve(summed, *inputs), inputs


def _backward(summed: bool, saved: Any, gradients: Any) -> Any:
    (x, kernel, bias, residual, parts, kernels), dy = saved, gradients[0]
    if kernel.shape[0] == 1:
        (dx,), (dkernel,) = product_gradients([x], [kernel[0, 0]], dy)
        dkernel = dkernel[None, None]
    else:
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        dx = convolve(False, dy, turned)[0] if has_kernel(dy, x.shape[-1]) else reference(dy, turned)
        (dkernel,) = jax.linear_transpose(lambda kernel: reference(x, kernel), kernel)(dy)
    dbias = None if bias is None else dy.sum(axis=(0, 1, 2), dtype=bias.dtype)
    return dx, dkernel, dbias, None if residual is None else dy, *product_gradients(parts, kernels, dy)


convolve.defvjp(_forward, _backward)
