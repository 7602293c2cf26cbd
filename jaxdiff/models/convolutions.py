"""3x3 convolutions with padding 1, as one operation with what is added to them: a bias, a map, products of others.

And what else the same kernel computes: convolutions of upsampled maps and attention's output, for the sums that it has
of its results, and several products of one map, which it reads but once.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxdiff.models import forms, norm, products, splitting
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


def cut(shape: Sequence[int], features: int, side: int = 3, summed: bool = True) -> Cut | None:
    """That for maps of this shape and kernels of `side` taps, rows and columns; None where the kernel does not fit.

    `summed`: with sums, where it has such. Of 128 positions for a warpgroup, or of 64 where fewer multiprocessors are
    without work then.
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
            large = taps > 1 or (summed and has_sums(shape))  # what is in shared memory besides, or a piece of the map
            found = Cut(rows, 128, box, taps, 3 if large else 4, 4)
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
    taps = kernel[::-1, ::-1].reshape(2, 2, 2, 2, *kernel.shape[2:])  # tap, which rows, tap, which columns
    y, *sums = call_kernel(True, 1, x, taps.transpose(1, 3, 0, 2, 5, 4), None, None, (), ())
    return y, sums[0] if sums else None


def each_product(
    x: Float[Array, "batch n c"],
    kernels: Sequence[Float[Array, "c features"]],
    biases: Sequence[Float[Array, " features"] | None],
) -> tuple[Float[Array, "batch n features"], ...]:
    """`products.each_product`, by one kernel for all of them, which reads x but once, where there is one."""
    batch, n, c = x.shape
    shape = batch, n // 32, 32, c
    if n % 32 or not has_kernel(jax.ShapeDtypeStruct(shape, x.dtype), kernels[0].shape[-1], side=1):
        return products.each_product(x, kernels, biases)
    maps = _each_product(x.reshape(shape), tuple(kernels), tuple(biases))
    return tuple(checkpoint_name(y.reshape(batch, n, -1), NAME) for y in maps)


@jax.custom_vjp
def _each_product(x: Array, kernels: tuple[Array, ...], biases: tuple[Array | None, ...]) -> tuple[Array, ...]:
    kernel, bias = jnp.concatenate(kernels, axis=-1), None
    if any(b is not None for b in biases):
        zeros = jnp.zeros(kernels[0].shape[-1])
        bias = jnp.concatenate([zeros if b is None else b.astype(jnp.float32) for b in biases])
    return tuple(call_kernel(False, len(kernels), x, kernel[None, None], bias, None, (), ()))


_each_product.defvjp(lambda *inputs: (_each_product(*inputs), inputs), products.each_product_gradients)


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


# Jitted, so that convolutions of the same shapes are traced and lowered once for all of them.
@functools.partial(jax.jit, static_argnums=(0, 1))
def call_kernel(
    summed: bool,
    parted: int,
    x: Float[Array, "batch h w c"],
    kernel: Float[Array, "*taps c features"],
    bias: Float[Array, " features"] | None,
    residual: Float[Array, "batch h w features"] | None,
    parts: tuple[Float[Array, "batch h w _"], ...],
    kernels: tuple[Float[Array, "_ features"], ...],
) -> Any:
    """`reference` by the kernel, added up in float32: a list of the map, and if `summed` maybe its sums.

    Of as many maps as `parted` says, that its features are divided into. Where the batch is split over devices each has
    its own images.
    """
    from jaxdiff.models import convolution_kernels  # Mosaic takes a second to import

    (*_, side, _, features), (batch, height, width, _) = kernel.shape, x.shape
    scale = 2 if side == 2 else 1
    bias = None if bias is None else bias.astype(jnp.float32)
    added = Added(bias is not None, residual is not None, tuple(part.shape[-1] for part in parts))
    results = [jax.ShapeDtypeStruct((batch, scale * height, scale * width, features // parted), x.dtype)] * parted
    if summed and has_sums(x.shape):
        runs = scale**2 * height * width // 128
        results.append(jax.ShapeDtypeStruct((batch, runs, 2, features), jnp.float32))
    # What there is for each image, and for all of them.
    each, one = (x, residual, parts), (kernel, bias, kernels)
    trees = [jax.tree.structure(tree) for tree in (each, one)]
    first, rest = jax.tree.leaves(each), jax.tree.leaves(one)

    def call(*arrays: Array) -> list[Array]:
        x, residual, parts = jax.tree.unflatten(trees[0], arrays[: len(first)])
        kernel, bias, kernels = jax.tree.unflatten(trees[1], [a[0] for a in arrays[len(first) :]])
        chosen = cut(x.shape, features, side, summed)
        if chosen is None:  # with so few images of a device
            return jnp.split(reference(x, kernel, bias, residual, parts, kernels), parted, axis=-1)
        blocks = forms.multiprocessors()
        run = convolution_kernels.build(
            x.shape, features, side, x.dtype, chosen, added, len(results) > parted, blocks, parted
        )
        inputs = jax.tree.leaves((x, kernel.reshape(-1, features), bias, residual, parts, kernels))
        found = run(*inputs)
        # Of 128 positions each, as on other devices, that may have other tiles.
        sums = [a.reshape(len(x), -1, 128 // chosen.rows, 2, features).sum(axis=2) for a in found[parted:]]
        return [*(y.reshape(len(x), *results[0].shape[1:]) for y in found[:parted]), *sums]

    return splitting.over_batch(call, (convolution_kernels.SOURCE, added), [*first, *(a[None] for a in rest)], results)


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
    return tuple(call_kernel(summed, 1, x, kernel, bias, residual, parts, kernels))


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
