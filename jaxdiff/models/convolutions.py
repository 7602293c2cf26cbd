"""3x3 convolutions with padding 1, as one operation with what is added to them: a bias, a map, products of others."""

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


def cut(shape: Sequence[int], features: int) -> Cut | None:
    """That for maps of this shape; None where the kernel does not fit them.

    Of 128 positions for a warpgroup, or of 64 where tiles are of several images and fewer multiprocessors are without
    work then.
    """
    batch, height, width, channels = shape
    if channels % 64 or features % 128 or Box.of(64, height, width) is None:
        return None
    best, found = 0.0, None
    for rows, worth in ((128, 1.0), (64, 0.85)):
        box = Box.of(2 * rows, height, width)
        if box is None or batch % box.images or (rows == 64 and box.images == 1):
            continue
        rounds = batch * height * width // (2 * rows) * (features // 128) / forms.multiprocessors()
        if rounds / math.ceil(rounds) * worth > best:
            best = rounds / math.ceil(rounds) * worth
            # Shared memory is read in eights of positions, of which a row has to have some to be a tap below another.
            taps = 3 if box.images == 1 and box.width % 8 == 0 else 1
            found = Cut(rows, 128, box, taps, 3 if box.images == 1 else 4, 4)
    return found


def has_kernel(x: Any, features: int) -> bool:
    """Whether the convolution of x [B, H, W, C], or its shape, is a kernel of our own: in half precision, on Hopper.

    No interpreter runs it.
    """
    on_gpu = norm.has_kernel() and not norm.INTERPRET and forms.capability() == 9.0
    return on_gpu and x.dtype in HALF and cut(x.shape, features) is not None


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


def reference(
    x: Float[Array, "batch h w c"],
    kernel: Float[Array, "3 3 c features"],
    bias: Float[Array, " features"] | None = None,
    residual: Float[Array, "batch h w features"] | None = None,
    parts: Sequence[Float[Array, "batch h w _"]] = (),
    kernels: Sequence[Float[Array, "_ features"]] = (),
) -> Float[Array, "batch h w features"]:
    """residual + (convolution + bias) + (sum of part @ kernel), left to XLA; of these cuDNN adds the first itself."""
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=LAYOUT)
    if bias is not None:
        y = norm.add_bias(y, bias)
    if residual is not None:
        y = residual + y
    return functools.reduce(jnp.add, [part @ kernel for part, kernel in zip(parts, kernels, strict=True)], y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(
    summed: bool,
    x: Float[Array, "batch h w c"],
    kernel: Float[Array, "3 3 c features"],
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
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    dx = convolve(False, dy, turned)[0] if has_kernel(dy, x.shape[-1]) else reference(dy, turned)
    (dkernel,) = jax.linear_transpose(lambda kernel: reference(x, kernel), kernel)(dy)
    dbias = None if bias is None else dy.sum(axis=(0, 1, 2), dtype=bias.dtype)
    return dx, dkernel, dbias, None if residual is None else dy, *product_gradients(parts, kernels, dy)


convolve.defvjp(_forward, _backward)
