"""How much a function computes, and how fast the device could: what a step's share of the peak is made of."""

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from jaxdiff.mesh import say

MATRIX_SIZE = {"cpu": 1024}  # of the products that `matmul_peak` times, by backend
RECOMPUTED = "rematted_computation"  # JAX's name for what a checkpoint computes again
PREFIXES = ("", "K", "M", "G", "T", "P", "E")


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of `function(*args)` in matrix products and convolutions; nothing is computed.

    Args: arrays or ShapeDtypeStructs, in trees. What is counted, and errors: `jaxpr_flops`.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args))


def jaxpr_flops(jaxpr: Any) -> int:
    """Floating-point operations of a traced function (`jax.make_jaxpr`, `jit(f).trace(...).jaxpr`) on all devices.

    A multiplication and its addition are two. Counted are the products that reach an output: not those with a
    convolution's padding, or with the zeros between the rows of a strided one's gradient, as XLA's `cost_analysis` has
    it, so that the gradient of a layer costs twice its forward pass. Of a `cond`'s branches the dearest counts, in a
    scan every turn. What `jax.checkpoint` computes again does not count, as it does not in cuDNN's attention, which
    keeps that to itself: two products forward and four backward. A kernel of Pallas counts what its `cost_estimate`
    says. What is written twice counts twice, though XLA may compute it once.

    Raises: ValueError for products in a while loop, whose turns nobody knows, or in a kernel of Pallas without one.
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    live, _ = dce_jaxpr(inner, [True] * len(inner.outvars))
    return _jaxpr(live)


def _jaxpr(jaxpr: Any) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if RECOMPUTED in str(equation.source_info.name_stack):
        return 0
    if name in MULTIPLICATIONS:
        return 2 * MULTIPLICATIONS[name](equation)
    if name == "pallas_call" and params["cost_estimate"] is not None:
        return params["cost_estimate"].flops
    inner = [_jaxpr(jaxpr) for jaxpr in jaxprs_in_params(params)]
    if name in ("while", "pallas_call") and any(inner):
        raise ValueError(f"there are matrix products in a {name}, which may be computed any number of times")
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "shard_map":
        return sum(inner) * math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return sum(inner)


def _dot_general(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
    p = equation.params
    image, kernel = (v.aval.shape for v in equation.invars)
    out = equation.outvars[0].aval.shape
    lhs, rhs, result = p["dimension_numbers"]  # each: batch (out), features (in), *spatial
    count = out[result[0]] * out[result[1]] * kernel[rhs[1]]
    for axis, stride in enumerate(p["window_strides"]):
        step, reach = p["lhs_dilation"][axis], p["rhs_dilation"][axis]
        size, taps, positions = image[lhs[axis + 2]], kernel[rhs[axis + 2]], out[result[axis + 2]]
        before, _ = p["padding"][axis]
        at = (o * stride + k * reach - before for o in range(positions) for k in range(taps))
        count *= sum(i % step == 0 and 0 <= i // step < size for i in at)
    return count


def _convolution_kernel(equation: Any) -> int:
    """Of `jaxdiff.models.convolution_kernels`, the one that is written in Mosaic: with padding, and products.

    Of 3 taps to a side, or 4 of an upsampled map that are in four kernels, two have a position beyond the border.
    """
    (batch, height, width, channels), (lines, features), *others = (v.aval.shape for v in equation.invars)
    products = sum(math.prod(shape) for shape in others if len(shape) == 2)
    side = math.isqrt(lines // channels)
    beyond = 2 if side > 1 else 0
    taps = (side * height - beyond) * (side * width - beyond)
    return batch * (channels * features * taps + products * height * width)


def _attention(equation: Any, products: int) -> int:
    """cuDNN's: `products` of the cost of q k^T; its layouts are [batch, length, heads, d] and, as 1, heads first."""
    q, k = (v.aval.shape for v in equation.invars[:2])
    length = 2 if equation.params["layout"] else 1
    return products * math.prod(q) * k[length]


MULTIPLICATIONS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "mosaic_gpu_p": _convolution_kernel,
    "dot_product_attention_fwd_wrapper": functools.partial(_attention, products=2),
    "dot_product_attention_bwd_wrapper": functools.partial(_attention, products=4),
}


@functools.cache
def matmul_peak(dtype: Any) -> float:
    """FLOP/s of one device in a chain of square matrix products of `dtype`, measured in a fifth of a second.

    The median over some pieces of the chain, at the precision that products have by default (of float32 on a GPU:
    TF32). The other devices of the host are idle; the fake ones of a CPU share what is measured here.
    """
    size = MATRIX_SIZE.get(jax.default_backend(), 8192)
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    w = x / math.sqrt(size)  # so that the chain's values stay as large as they are
    product = jax.jit(jnp.matmul)

    def seconds(times: int) -> float:
        nonlocal x
        begin = time.perf_counter()
        for _ in range(times):
            x = product(x, w)
        x.block_until_ready()
        return time.perf_counter() - begin

    seconds(1)  # compiles
    times = max(1, int(0.03 / seconds(1)))
    return 2 * size**3 * times / statistics.median(seconds(times) for _ in range(5))


def least_step_time(stage: str, count: Callable[[], int], images: int, dtype: Any, devices: int) -> float | None:
    """Seconds that a step would take at the peak of all devices, and says what that is made of.

    Args: count, returns the operations of the step (`jaxpr_flops`), of so many images in all. A discriminator that does
    not play yet is counted as if it did. None where the figure cannot be had: the run goes on without.
    """
    dtype = jnp.dtype(dtype)
    try:
        flops, peak = count(), matmul_peak(dtype)
    except Exception as error:  # whatever it is, a run does not end for a figure in its log
        say(f"{stage}: no mfu in metrics.jsonl: {' '.join(str(error).split())}")
        return None
    share = f"{readable(flops / images)}FLOP an image"
    say(f"{stage}: {share}, peak {readable(peak)}FLOP/s a device ({dtype.name} matrix products)")
    return flops / (devices * peak)


def readable(value: float) -> str:
    """1.234e9 as "1.23 G"."""
    power = min(int(math.log10(max(value, 1)) // 3), len(PREFIXES) - 1)
    return f"{value / 1000**power:.3g} {PREFIXES[power]}"
