"""Products of maps with small kernels, as one operation with what is added to them.

A 1x1 convolution of a concatenation, unmade, is a sum of products; queries, keys and values are the pieces of one.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.models import forms, norm

HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


class Cut(NamedTuple):
    """How the kernel is cut: a block of threads, `warps` of 32, computes `tiles` tiles [rows, columns] of the sum.

    chunks: steps that a tile takes over the channels, of all parts at once; with 1 the kernels are read but once for
    all tiles. stages: what is in shared memory at once, of steps, or with 1 chunk of tiles.
    """

    rows: int
    columns: int
    chunks: int
    tiles: int
    warps: int
    stages: int


def cut(widths: Sequence[int], features: int) -> Cut:
    """That for parts so wide: within 227 KB of shared memory, and without spilled registers, on an H100 and an H200."""
    columns = 256 if features % 256 == 0 else 128
    if sum(widths) * columns <= 256 * 128:
        return Cut(rows=64, columns=columns, chunks=1, tiles=16, warps=4, stages=3)
    # With 128 columns two stages leave room for a second block of threads beside, which is worth more than a third.
    stages, step = 2 if columns == 128 else 3, 64 if len(widths) == 1 else 32
    return Cut(rows=128, columns=columns, chunks=math.gcd(*widths) // step, tiles=1, warps=8, stages=stages)


def has_kernel(parts: Sequence[Float[Array, "*rest _"]], features: int) -> bool:
    """Whether the sum is computed by a kernel of our own: in half precision of large maps, on a Hopper GPU.

    Whatever is narrow or of very unlike widths is left to XLA.
    """
    widths = [part.shape[-1] for part in parts]
    shared = math.gcd(*widths)
    fits = features % 128 == 0 and shared % 64 == 0 and sum(widths) <= 3 * shared
    large = math.prod(parts[0].shape[:-1]) >= 4096
    return norm.has_kernel() and forms.capability() == 9.0 and fits and large and parts[0].dtype in HALF


def add_products(
    parts: Sequence[Float[Array, "batch *rest _"]],
    kernels: Sequence[Float[Array, "_ features"]],
    bias: Float[Array, " features"] | None = None,
    residual: Float[Array, "batch *rest features"] | None = None,
) -> Float[Array, "batch *rest features"]:
    """residual + bias + sum of part @ kernel; all but the bias of one dtype."""
    more_than_a_product = len(parts) > 1 or residual is not None
    flat = _positions([*parts, *([] if residual is None else [residual])])
    inputs = tuple(flat[: len(parts)]), tuple(kernels), bias, None if residual is None else flat[-1]
    if more_than_a_product and has_kernel(parts, kernels[0].shape[-1]):
        (y,) = multiply(norm.INTERPRET, 1, *inputs)
    else:
        (y,) = reference(1, *inputs)
    return y.reshape(*parts[0].shape[:-1], -1)


def split_product(
    x: Float[Array, "batch n c"], kernel: Float[Array, "c outputs*features"], bias: Array | None, outputs: int
) -> tuple[Float[Array, "batch n features"], ...]:
    """As many pieces of x @ kernel + bias [outputs * features]; the latter may be None.

    To split the kernel is cheaper than to split the result, and to put together the gradients of its pieces.
    """
    inputs = (x,), (kernel,), bias, None
    if outputs > 1 and has_kernel([x], kernel.shape[-1] // outputs):
        return multiply(norm.INTERPRET, outputs, *inputs)
    return reference(outputs, *inputs)


def _positions(maps: Sequence[Array]) -> list[Float[Array, "batch n _"]]:
    return [x.reshape(len(x), -1, x.shape[-1]) for x in maps]


def reference(
    outputs: int,
    parts: tuple[Float[Array, "b n _"], ...],
    kernels: tuple[Float[Array, "_ outputs*features"], ...],
    bias: Float[Array, " outputs*features"] | None,
    residual: Float[Array, "b n features"] | None,
) -> tuple[Float[Array, "b n features"], ...]:
    """residual + (sum of part @ kernel + bias), in pieces, each product rounded; left to XLA."""
    pieces = zip(*(jnp.split(kernel, outputs, axis=1) for kernel in kernels), strict=True)
    sums = [functools.reduce(jnp.add, [x @ k for x, k in zip(parts, own, strict=True)]) for own in pieces]
    if bias is not None:
        biases = jnp.split(bias, outputs)
        sums = [y + b.astype(y.dtype)[None, None] for y, b in zip(sums, biases, strict=True)]
    return tuple(sums if residual is None else [residual + y for y in sums])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def multiply(
    interpret: bool,
    outputs: int,
    parts: tuple[Array, ...],
    kernels: tuple[Array, ...],
    bias: Array | None,
    residual: Array | None,
) -> tuple[Float[Array, "b n features"], ...]:
    """`reference` by the kernel of `jaxdiff.models.product_kernels`, rounded once; `interpret`: without a GPU."""
    from jaxdiff.models import product_kernels  # Pallas takes a second to import

    chosen = cut([part.shape[-1] for part in parts], kernels[0].shape[-1] // outputs)
    return tuple(product_kernels.multiply(chosen, interpret, outputs, parts, kernels, bias, residual))


def _forward(interpret: bool, outputs: int, *inputs: Any) -> Any:
    return multiply(interpret, outputs, *inputs), inputs


def _backward(interpret: bool, outputs: int, saved: Any, dy: tuple[Array, ...]) -> Any:
    parts, kernels, bias, residual = saved
    dparts, *others = jax.vjp(functools.partial(reference, outputs), *saved)[1](dy)
    if outputs > 1:  # the gradient of what is split is a sum, of which XLA would round each product
        dparts = (add_products(dy, [k.T for k in jnp.split(kernels[0], outputs, axis=1)]),)
    return dparts, *others


multiply.defvjp(_forward, _backward)
