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

from jaxdiff.models import splitting
from jaxdiff.models.products import Cut, reference

SOURCE = zlib.crc32(pathlib.Path(__file__).read_bytes())


def start(cut: Cut, block: Any, tile: Any, rows: int) -> Any:
    """The first of a tile's rows, of so many in all.

    What would reach beyond them ends with them, and computes some again: nothing is masked.
    """
    return jnp.minimum((block * cut.tiles + tile) * cut.rows, rows - cut.rows)


# Jitted, so that sums of the same shapes are traced and lowered once for all of them.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def multiply(
    cut: Cut,
    interpret: bool,
    outputs: int,
    parts: tuple[Float[Array, "b n _"], ...],
    kernels: tuple[Float[Array, "_ outputs*features"], ...],
    bias: Float[Array, " outputs*features"] | None,
    residual: Float[Array, "b n features"] | None,
) -> list[Float[Array, "b n features"]]:
    """As `products.reference`, added up in float32; where the batch is split over devices each has its own images."""
    count, widths, features = len(parts), [part.shape[-1] for part in parts], kernels[0].shape[-1] // outputs
    result = jax.ShapeDtypeStruct((*parts[0].shape[:-1], features), parts[0].dtype)

    def sum_of_products(*refs: Any) -> None:
        (*refs_in, bias_ref, residual_ref), y_refs = arguments(refs[:-outputs]), refs[-outputs:]
        x_refs, kernel_refs = refs_in[:count], refs_in[count:]
        place, block = pl.program_id(0), pl.program_id(1)
        columns = pl.ds(place * cut.columns, cut.columns)

        def channels(chunk: Any) -> list[Any]:
            return [pl.ds(chunk * (width // cut.chunks), width // cut.chunks) for width in widths]

        def read_kernels(chunk: Any) -> list[Float[Array, "_ columns"]]:
            return [ref[own, columns] for ref, own in zip(kernel_refs, channels(chunk), strict=True)]

        held = read_kernels(0) if cut.chunks == 1 else None

        def store(rows: Any, value: Float[Array, "rows columns"]) -> None:
            blocks = features // cut.columns  # of an output
            for number, y_ref in enumerate(y_refs):
                at = pl.ds((place - number * blocks) * cut.columns, cut.columns)

                def write(y_ref: Any = y_ref, at: Any = at) -> None:
                    y_ref[rows, at] = value.astype(y_ref.dtype)

                write() if outputs == 1 else pl.when(jax.lax.div(place, blocks) == number)(write)

        def tile(step: Any) -> None:
            rows = pl.ds(start(cut, block, step, y_refs[0].shape[0]), cut.rows)

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
            store(rows, total)

        if cut.tiles == 1:
            tile(0)
        else:
            jax.lax.fori_loop(0, cut.tiles, lambda step, _: tile(step), None)

    def arguments(arrays: Sequence[Any]) -> list[Any]:
        """Parts, kernels, bias and residual, of which the last two may be None."""
        rest = list(arrays[2 * count :])
        return [*arrays[: 2 * count], *(None if a is None else rest.pop(0) for a in (bias, residual))]

    def call(*arrays: Array) -> list[Float[Array, "b n features"]]:
        batch, positions, _ = arrays[0].shape
        rows = batch * positions
        *maps, added, other = arguments(arrays)
        xs, ws, added = maps[:count], [kernel[0] for kernel in maps[count:]], None if added is None else added[0]
        if rows < cut.rows:  # of a device
            return list(reference(outputs, tuple(xs), tuple(ws), added, other))
        flat = [x if x is None else x.reshape(rows, -1) for x in (*xs, other)]
        inputs = [*flat[:-1], *ws, *(a for a in (added, flat[-1]) if a is not None)]
        ys = pl.pallas_call(
            sum_of_products,
            out_shape=[jax.ShapeDtypeStruct((rows, features), result.dtype)] * outputs,
            # Neighbours read the same rows.
            grid=(outputs * features // cut.columns, pl.cdiv(rows, cut.rows * cut.tiles)),
            compiler_params=triton.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
            cost_estimate=pl.CostEstimate(
                flops=2 * rows * sum(widths) * outputs * features,
                bytes_accessed=sum(a.nbytes for a in inputs) + rows * outputs * features * result.dtype.itemsize,
                transcendentals=0,
            ),
            interpret=interpret,
            name=sum_of_products.__name__,
        )(*inputs)
        return [y.reshape(batch, positions, features) for y in ys]

    one = [*kernels, *([] if bias is None else [bias])]  # for all images
    inputs = [*parts, *(a[None] for a in one), *([] if residual is None else [residual])]
    identity = SOURCE, cut, outputs, bias is None, residual is None
    return splitting.over_batch(call, identity, inputs, [result] * outputs)
