"""Reductions over all pairs of rows of two sets, in blocks and in float64, so that 50,000 x 50,000 pairs fit.

The queries are split over the devices, each of which has all keys and goes through them block by block.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from jaxdiff import mesh as meshes

QUERIES, KEYS = 1024, 4096  # rows of a block at most; queries on each device

Block = Mapping[str, Array]
# (what a query has so far, queries [q, d], a block of keys) -> what it has now; leaves have a row for each query.
Step = Callable[[Any, Float[Array, "q d"], Block], Any]


def over_pairs(
    step: Step, start: Any, queries: Float[np.ndarray, "n d"], keys: Mapping[str, np.ndarray], mesh: Mesh
) -> Any:
    """What `step` makes of `start` (leaves [n, ...]) when it has seen all keys; host arrays, equal on all processes.

    Args: step, a function of a module, as a program is compiled for each; keys, "rows" [m, d] and what else belongs to
    them, [m, ...]: a block has "kept" besides, false for what only fills it up. Host arrays are equal on all processes.
    """
    size = -(-_even(len(queries), QUERIES * mesh.size) // mesh.size) * mesh.size
    length = _even(len(keys["rows"]), KEYS)
    filled = {"kept": np.ones(len(keys["rows"]), bool), **keys}
    with jax.enable_x64(True):
        blocks = {
            k: _filled(x, -(-len(x) // length) * length).reshape(-1, length, *x.shape[1:]) for k, x in filled.items()
        }
        blocks, program = meshes.put_replicated(blocks, mesh), _program(step, mesh)
        parts = []
        for i in range(0, len(queries), size):
            part = jax.tree.map(lambda x, i=i: _filled(np.asarray(x[i : i + size]), size), (start, queries))
            parts.append(program(*meshes.put_batch(part, mesh), blocks))
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(queries)], *(meshes.to_host(part) for part in parts))


def squared_distances(a: Float[Array, "q d"], b: Float[Array, "b d"]) -> Float[Array, "q b"]:
    """|a - b|^2 of all pairs as |a|^2 - 2 a b + |b|^2 in float64, where what may be rounding is 0."""
    a, b = a.astype(jnp.float64), b.astype(jnp.float64)
    norms = jnp.square(a).sum(1)[:, None] + jnp.square(b).sum(1)[None]
    squared = norms - 2 * inner_products(a, b)
    return jnp.where(squared > 1e-13 * norms, squared, 0)


def inner_products(a: Float[Array, "q d"], b: Float[Array, "b d"]) -> Float[Array, "q b"]:
    """a b of all pairs, in float64."""
    return jnp.matmul(a.astype(jnp.float64), b.astype(jnp.float64).T, precision="highest")


@functools.cache
def _program(step: Step, mesh: Mesh) -> Any:
    def run(start: Any, queries: Array, blocks: Block) -> Any:
        return lax.scan(lambda carry, block: (step(carry, queries, block), None), start, blocks)[0]

    rows, whole = PartitionSpec("data"), PartitionSpec()
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(rows, rows, whole), out_specs=rows))


def _even(n: int, most: int) -> int:
    """The length of the fewest equal parts of n rows that have `most` rows at most."""
    return -(-n // -(-n // most))


def _filled(x: np.ndarray, size: int) -> np.ndarray:
    return np.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)])
