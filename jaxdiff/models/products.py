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


def has_kernel(parts: Sequence[Any], features: int) -> bool:
    """Whether the sum is computed by a kernel of our own: in half precision of large maps, on a Hopper GPU.

    Args: parts, arrays [*rest, C_i] or their shapes. Whatever is narrow or of very unlike widths is left to XLA.
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
    """residual + (sum of part @ kernel + bias); all but the bias of one dtype."""
    more_than_a_product = len(parts) > 1 or bias is not None or residual is not None
    one_dtype = residual is None or residual.dtype == parts[0].dtype
    flat = tuple(part.reshape(len(part), -1, part.shape[-1]) for part in parts)
    other = None if residual is None else residual.reshape(len(residual), -1, residual.shape[-1])
    if more_than_a_product and one_dtype and has_kernel(parts, kernels[0].shape[-1]):
        y = multiply(norm.INTERPRET, flat, tuple(kernels), bias, other)
    else:
        y = reference(flat, tuple(kernels), bias, other)
    return y.reshape(*parts[0].shape[:-1], -1)


def reference(
    parts: tuple[Float[Array, "b n _"], ...],
    kernels: tuple[Float[Array, "_ features"], ...],
    bias: Float[Array, " features"] | None = None,
    residual: Float[Array, "b n features"] | None = None,
) -> Float[Array, "b n features"]:
    """residual + (sum of part @ kernel + bias), each rounded; left to XLA."""
    y = functools.reduce(jnp.add, [part @ kernel for part, kernel in zip(parts, kernels, strict=True)])
    if bias is not None:
        y = y + jnp.broadcast_to(bias, y.shape).astype(y.dtype)  # so that backward the sum is of the bias's dtype
    return y if residual is None else residual + y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def multiply(
    interpret: bool,
    parts: tuple[Float[Array, "b n _"], ...],
    kernels: tuple[Float[Array, "_ features"], ...],
    bias: Float[Array, " features"] | None = None,
    residual: Float[Array, "b n features"] | None = None,
) -> Float[Array, "b n features"]:
    """`reference` by the kernel of `jaxdiff.models.product_kernels`, rounded once; `interpret`: without a GPU."""
    from jaxdiff.models import product_kernels  # Pallas takes a second to import

    chosen = cut([part.shape[-1] for part in parts], kernels[0].shape[-1])
    return product_kernels.multiply(chosen, interpret, parts, kernels, bias, residual)


def _forward(interpret: bool, *inputs: Any) -> Any:
    return multiply(interpret, *inputs), inputs


def product_gradients(
    parts: Sequence[Float[Array, "*rest _"]], kernels: Sequence[Float[Array, "_ features"]], dy: Array
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Those of parts and of kernels, from that of the sum of their products."""
    dparts: list[Array] = []
    dkernels: list[Array] = []
    for part, kernel in zip(parts, kernels, strict=True):
        # With barriers, for XLA would make one product of all gradients of parts, and copy its pieces; and its products
        # leave partial sums, which it would add up, slowly, where the gradients of kernels are put together.
        one, dparts, dkernels = jax.lax.optimization_barrier((dy, dparts, dkernels))
        dpart, dkernel = jax.vjp(jnp.matmul, part, kernel)[1](one)
        dparts, dkernels = [*dparts, dpart], [*dkernels, dkernel]
    return tuple(dparts), tuple(jax.lax.optimization_barrier(dkernels))


def _backward(interpret: bool, saved: Any, dy: Array) -> Any:
    parts, kernels, bias, residual = saved
    dparts, dkernels = product_gradients(parts, kernels, dy)
    return dparts, dkernels, _bias_gradient(dy, bias), None if residual is None else dy


def _bias_gradient(dy: Array, bias: Array | None) -> Array | None:
    return None if bias is None else dy.sum(axis=tuple(range(dy.ndim - 1)), dtype=bias.dtype)


multiply.defvjp(_forward, _backward)


def each_product(
    x: Float[Array, "batch n c"],
    kernels: Sequence[Float[Array, "c features"]],
    biases: Sequence[Float[Array, " features"] | None],
) -> tuple[Float[Array, "batch n features"], ...]:
    """x @ kernel + bias, where there is one, for all of them, whose gradient for x is a sum as in `add_products`.

    (One kernel for all, that reads x but once, was slower than XLA's.)
    """
    c, features = kernels[0].shape
    gradient = jax.ShapeDtypeStruct((*x.shape[:-1], features), x.dtype)
    own = len(kernels) > 1 and has_kernel([gradient] * len(kernels), c)
    return (_each_product if own else _each)(x, tuple(kernels), tuple(biases))


def _each(x: Array, kernels: tuple[Array, ...], biases: tuple[Array | None, ...]) -> tuple[Array, ...]:
    results: list[Array] = []
    for kernel, bias in zip(kernels, biases, strict=True):
        # With barriers, for XLA would make one product of several, where they are small, and copy its pieces.
        one, results = jax.lax.optimization_barrier((x, results))
        results = [*results, add_products([one], [kernel], bias)]
    return tuple(results)


def _each_forward(x: Array, kernels: tuple[Array, ...], biases: tuple[Array | None, ...]) -> Any:
    return _each(x, kernels, biases), (x, kernels, biases)


def each_product_gradients(saved: Any, dy: tuple[Array, ...]) -> Any:
    """Those of x [batch, *rest, c], kernels and biases, which are `saved`."""
    x, kernels, biases = saved
    dkernels = tuple(jax.linear_transpose(lambda k: x @ k, kernel)(d)[0] for kernel, d in zip(kernels, dy, strict=True))
    dbiases = tuple(_bias_gradient(d, bias) for d, bias in zip(dy, biases, strict=True))
    return add_products(dy, [kernel.T for kernel in kernels]), dkernels, dbiases


_each_product = jax.custom_vjp(_each)
_each_product.defvjp(_each_forward, each_product_gradients)
