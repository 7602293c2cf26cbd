"""The sum of products of several maps with a kernel each: a 1x1 convolution of their concatenation, unmade."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

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
    stages = 2 if columns == 128 else 3
    return Cut(rows=128, columns=columns, chunks=math.gcd(*widths) // 32, tiles=1, warps=8, stages=stages)


def has_kernel(parts: Sequence[Float[Array, "*rest _"]], features: int) -> bool:
    """Whether the sum is computed by a kernel of our own: in half precision of several large maps, on a Hopper GPU.

    Whatever is narrow or of very unlike widths is left to XLA.
    """
    widths = [part.shape[-1] for part in parts]
    shared = math.gcd(*widths)
    fits = features % 128 == 0 and shared % 64 == 0 and sum(widths) <= 3 * shared
    large = len(parts) > 1 and math.prod(parts[0].shape[:-1]) >= 4096
    return norm.has_kernel() and forms.capability() == 9.0 and fits and large and parts[0].dtype in HALF


def add_products(
    parts: Sequence[Float[Array, "batch h w _"]], kernels: Sequence[Float[Array, "_ features"]]
) -> Float[Array, "batch h w features"]:
    """Sum of part @ kernel, all of one dtype."""
    if not has_kernel(parts, kernels[0].shape[-1]):
        return reference(tuple(parts), tuple(kernels))
    b, h, w, _ = parts[0].shape
    flat = tuple(part.reshape(b, h * w, -1) for part in parts)
    return multiply(norm.INTERPRET, flat, tuple(kernels)).reshape(b, h, w, -1)


def reference(parts: tuple[Array, ...], kernels: tuple[Array, ...]) -> Float[Array, "*rest features"]:
    """Sum of parts [*rest, C_i] @ kernels [C_i, features], each rounded; left to XLA."""
    return functools.reduce(jnp.add, [part @ kernel for part, kernel in zip(parts, kernels, strict=True)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply(
    interpret: bool, parts: tuple[Float[Array, "b n _"], ...], kernels: tuple[Float[Array, "_ features"], ...]
) -> Float[Array, "b n features"]:
    """`reference` by the kernel of `jaxdiff.models.product_kernels`, rounded once; `interpret`: without a GPU."""
    from jaxdiff.models import product_kernels  # Pallas takes a second to import

    chosen = cut([part.shape[-1] for part in parts], kernels[0].shape[-1])
    return product_kernels.multiply(chosen, interpret, parts, kernels)


def _forward(interpret: bool, *inputs: tuple[Array, ...]) -> tuple[Array, tuple[tuple[Array, ...], ...]]:
    return multiply(interpret, *inputs), inputs


def _backward(interpret: bool, saved: tuple[tuple[Array, ...], ...], dy: Array) -> tuple[tuple[Array, ...], ...]:
    return jax.vjp(reference, *saved)[1](dy)


multiply.defvjp(_forward, _backward)
