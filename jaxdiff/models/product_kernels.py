"""The sum of products of `jaxdiff.models.products` as one GPU kernel, written in Pallas and lowered by Triton.

Bound by memory: each element of the maps is read once, where the sum is not wider than a block of threads has it.
"""

import functools
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from jaxdiff.models import products, splitting
from jaxdiff.models.products import Cut, reference

SOURCE = [zlib.crc32(pathlib.Path(str(file)).read_bytes()) for file in (__file__, products.__file__)]


def start(cut: Cut, block: Any, tile: Any, rows: int) -> Any:
    """The first of a tile's rows, of so many in all.

    What would reach beyond them ends with them, and computes some again: nothing is masked.
    """
    return jnp.minimum((block * cut.tiles + tile) * cut.rows, rows - cut.rows)


# Jitted, so that sums of the same shapes are traced and lowered once for all of them.
@functools.partial(jax.jit, static_argnums=(0, 1))
def multiply(
    cut: Cut,
    interpret: bool,
    parts: tuple[Float[Array, "b n _"], ...],
    kernels: tuple[Float[Array, "_ features"], ...],
    bias: Float[Array, " features"] | None,
    residual: Float[Array, "b n features"] | None,
) -> Float[Array, "b n features"]:
    """As `products.reference`, added up in float32; where the batch is split over devices each has its own images."""
    count, widths, features = len(parts), [part.shape[-1] for part in parts], kernels[0].shape[-1]
    result = jax.ShapeDtypeStruct((*parts[0].shape[:-1], features), parts[0].dtype)

    def arguments(arrays: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        """Parts, kernels, bias and residual, of which the last two may be None."""
        rest = iter(arrays[2 * count :])
        added, other = (None if a is None else next(rest) for a in (bias, residual))
        return arrays[:count], arrays[count : 2 * count], added, other

    def sum_of_products(*refs: Any) -> None:
        (x_refs, kernel_refs, bias_ref, residual_ref), y_ref = arguments(refs[:-1]), refs[-1]
        columns, block = pl.ds(pl.program_id(0) * cut.columns, cut.columns), pl.program_id(1)

        def channels(chunk: Any) -> list[Any]:
            return [pl.ds(chunk * (width // cut.chunks), width // cut.chunks) for width in widths]

        def read_kernels(chunk: Any) -> list[Float[Array, "_ columns"]]:
            return [ref[own, columns] for ref, own in zip(kernel_refs, channels(chunk), strict=True)]

        held = read_kernels(0) if cut.chunks == 1 else None

        def tile(step: Any) -> None:
            rows = pl.ds(start(cut, block, step, y_ref.shape[0]), cut.rows)

            def add(chunk: Any, total: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
                for ref, own, kernel in zip(x_refs, channels(chunk), held or read_kernels(chunk), strict=True):
                    total += jnp.dot(ref[rows, own], kernel, preferred_element_type=jnp.float32)
                return total

            zeros = jnp.zeros((cut.rows, cut.columns), jnp.float32)
            total = add(0, zeros) if held else jax.lax.fori_loop(0, cut.chunks, add, zeros)
            if bias is not None:
                total += bias_ref[columns][None, :]
            if residual is not None:
                total += residual_ref[rows, columns].astype(jnp.float32)
            y_ref[rows, columns] = total.astype(y_ref.dtype)

        if cut.tiles == 1:
            tile(0)
        else:
            jax.lax.fori_loop(0, cut.tiles, lambda step, _: tile(step), None)

    def call(*arrays: Array) -> list[Float[Array, "b n features"]]:
        xs, ws, added, other = arguments(arrays)
        ws, added = tuple(kernel[0] for kernel in ws), None if added is None else added[0]
        batch, positions, _ = xs[0].shape
        rows = batch * positions
        if rows < cut.rows:  # of a device
            return [reference(xs, ws, added, other)]
        *flat, other = [x if x is None else x.reshape(rows, -1) for x in (*xs, other)]
        inputs = [*flat, *ws, *(a for a in (added, other) if a is not None)]
        y = pl.pallas_call(
            sum_of_products,
            out_shape=jax.ShapeDtypeStruct((rows, features), result.dtype),
            grid=(features // cut.columns, pl.cdiv(rows, cut.rows * cut.tiles)),  # neighbours read the same rows
            compiler_params=triton.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
            cost_estimate=pl.CostEstimate(
                flops=2 * rows * sum(widths) * features,
                bytes_accessed=sum(a.nbytes for a in inputs) + rows * features * result.dtype.itemsize,
                transcendentals=0,
            ),
            interpret=interpret,
            name=sum_of_products.__name__,
        )(*inputs)
        return [y.reshape(batch, positions, features)]

    one = [*kernels, *([] if bias is None else [bias])]  # for all images
    inputs = [*parts, *(a[None] for a in one), *([] if residual is None else [residual])]
    (y,) = splitting.over_batch(call, (SOURCE, cut, bias is None, residual is None), inputs, [result])
    return y
