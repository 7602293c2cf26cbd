"""Attention as three GPU kernels, written in Pallas and lowered by Triton: forward, and two for the gradients.

A block of threads has a tile of queries (or, for the gradients of keys and values, of keys) of one head of one image,
and goes through all keys (or queries). Weights are never stored (Dao 2023, arXiv 2307.08691).
"""

import functools
import math
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from jaxdiff.models import splitting
from jaxdiff.models.attention import TILE  # of a block of threads, and of what it reads at a time: 128 was slower

SOURCE = zlib.crc32(pathlib.Path(__file__).read_bytes())
WARPS, STAGES = 4, 3  # of 32 threads; what is in shared memory at once, of what is read


def _tile(number: Any) -> Any:
    return pl.ds(number * TILE, TILE)


def _dot(a: Array, b: Array) -> Float[Array, "_ _"]:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


# Jitted, here and below, so that attention of the same shapes is traced and lowered once for all of it.
@functools.partial(jax.jit, static_argnames="interpret")
def forward(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"], interpret: bool = False
) -> tuple[Float[Array, "b n h d"], Float[Array, "b h n"]]:
    """Attention, and each query's logarithm, to base 2, of the sum of exponentials of its logits.

    Of n and m positions, both multiples of `TILE`; what is computed of n x m is float32.
    """
    (b, n, h, d), m = q.shape, k.shape[1]
    factor = math.log2(math.e) / math.sqrt(d)

    def attention_forward(q_ref: Any, k_ref: Any, v_ref: Any, y_ref: Any, log_ref: Any) -> None:
        rows, head = _tile(pl.program_id(0)), pl.program_id(1)
        query = q_ref[rows, head, :]

        def add(step: Any, state: Any) -> Any:
            total, weight, largest = state
            keys = _tile(step)
            logits = _dot(query, k_ref[keys, head, :].T) * factor
            new = jnp.maximum(largest, logits.max(axis=1))
            weights, shrink = jnp.exp2(logits - new[:, None]), jnp.exp2(largest - new)
            total = total * shrink[:, None] + _dot(weights.astype(v_ref.dtype), v_ref[keys, head, :])
            return total, weight * shrink + weights.sum(axis=1), new

        start = jnp.zeros((TILE, d)), jnp.zeros(TILE), jnp.full(TILE, -jnp.inf)
        total, weight, largest = jax.lax.fori_loop(0, m // TILE, add, start)
        y_ref[rows, head, :] = (total / weight[:, None]).astype(y_ref.dtype)
        log_ref[head, rows] = largest + jnp.log2(weight)

    outputs = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, n), jnp.float32)]
    return tuple(_call(attention_forward, n, [q, k, v], outputs, interpret, products=2))


@functools.partial(jax.jit, static_argnames="interpret")
def backward(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    y: Float[Array, "b n h d"],
    log: Float[Array, "b h n"],
    dy: Float[Array, "b n h d"],
    interpret: bool = False,
) -> tuple[Float[Array, "b n h d"], Float[Array, "b m h d"], Float[Array, "b m h d"]]:
    """The gradients of q, k and v, from what `forward` returned and the gradient of y."""
    (_, n, _, d), m = q.shape, k.shape[1]
    scale = 1 / math.sqrt(d)
    factor = scale * math.log2(math.e)

    def attention_gradient_of_queries(
        q_ref: Any, k_ref: Any, v_ref: Any, y_ref: Any, log_ref: Any, dy_ref: Any, dq_ref: Any, mean_ref: Any
    ) -> None:
        rows, head = _tile(pl.program_id(0)), pl.program_id(1)
        query, dy, log = q_ref[rows, head, :], dy_ref[rows, head, :], log_ref[head, rows]
        # The mean of each query's gradients of weights.
        mean = (dy.astype(jnp.float32) * y_ref[rows, head, :].astype(jnp.float32)).sum(axis=1)
        mean_ref[head, rows] = mean

        def add(step: Any, dq: Float[Array, "rows d"]) -> Float[Array, "rows d"]:
            keys = _tile(step)
            key = k_ref[keys, head, :]
            weights = jnp.exp2(_dot(query, key.T) * factor - log[:, None])
            dlogits = weights * (_dot(dy, v_ref[keys, head, :].T) - mean[:, None])
            return dq + _dot(dlogits.astype(key.dtype), key)

        dq = jax.lax.fori_loop(0, m // TILE, add, jnp.zeros((TILE, d)))
        dq_ref[rows, head, :] = (dq * scale).astype(dq_ref.dtype)

    def attention_gradient_of_keys(
        q_ref: Any, k_ref: Any, v_ref: Any, log_ref: Any, dy_ref: Any, mean_ref: Any, dk_ref: Any, dv_ref: Any
    ) -> None:
        keys, head = _tile(pl.program_id(0)), pl.program_id(1)
        key, value = k_ref[keys, head, :], v_ref[keys, head, :]

        def add(step: Any, state: Any) -> Any:
            dk, dv = state
            rows = _tile(step)
            query, dy = q_ref[rows, head, :], dy_ref[rows, head, :]
            weights = jnp.exp2(_dot(key, query.T) * factor - log_ref[head, rows][None, :])
            dv = dv + _dot(weights.astype(dy.dtype), dy)
            dlogits = weights * (_dot(value, dy.T) - mean_ref[head, rows][None, :])
            return dk + _dot(dlogits.astype(query.dtype), query), dv

        dk, dv = jax.lax.fori_loop(0, n // TILE, add, (jnp.zeros((TILE, d)),) * 2)
        dk_ref[keys, head, :] = (dk * scale).astype(dk_ref.dtype)
        dv_ref[keys, head, :] = dv.astype(dv_ref.dtype)

    like_q, like_k, like_log = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, k, log))
    inputs, outputs = [q, k, v, y, log, dy], [like_q, like_log]
    dq, mean = _call(attention_gradient_of_queries, n, inputs, outputs, interpret, products=2)
    inputs, outputs = [q, k, v, log, dy, mean], [like_k, like_k]
    dk, dv = _call(attention_gradient_of_keys, m, inputs, outputs, interpret, products=2)
    return dq, dk, dv


def _call(
    kernel: Callable[..., None],
    positions: int,
    inputs: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    interpret: bool,
    products: int,
) -> Any:
    """The kernel on all images and heads, and `positions` in tiles; where the batch is split each device has its own.

    products: that count, of as many multiplications as the logits; what is computed again does not.
    """

    def call(*arrays: Array) -> Any:
        size, (_, n, h, d), m = len(arrays[0]), inputs[0].shape, inputs[1].shape[1]
        shapes = [jax.ShapeDtypeStruct((size, *o.shape[1:]), o.dtype) for o in outputs]
        all_of_it: list[Any] = [*arrays, *shapes]

        def spec(a: Any) -> pl.BlockSpec:
            return pl.BlockSpec((None, *a.shape[1:]), lambda tile, head, image: (image, *[0] * (a.ndim - 1)))

        return pl.pallas_call(
            kernel,
            out_shape=shapes,
            grid=(positions // TILE, h, size),  # neighbours read the same keys
            in_specs=[spec(a) for a in arrays],
            out_specs=[spec(o) for o in outputs],
            compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
            cost_estimate=pl.CostEstimate(
                flops=products * 2 * size * h * n * m * d,
                bytes_accessed=sum(math.prod(a.shape) * a.dtype.itemsize for a in all_of_it),
                transcendentals=size * h * n * m,
            ),
            interpret=interpret,
            name=kernel.__name__,
        )(*arrays)

    return splitting.over_batch(call, (SOURCE, kernel.__name__), inputs, outputs)
