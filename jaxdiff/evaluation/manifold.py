"""Nearest neighbours in a space of features, and the precision and recall that are made of them."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxdiff.errors import ConfigError
from jaxdiff.evaluation.pairs import Block, over_pairs, squared_distances
from jaxdiff.evaluation.rows import check_rows

Features = Float[np.ndarray, "n d"]
Neighbours = tuple[Float[Array, "q k"], Int[Array, "q k"]]  # squared distances, rows of the keys


def nearest(
    queries: Float[np.ndarray, "q d"], keys: Float[np.ndarray, "m d"], k: int, mesh: Mesh
) -> tuple[Int[np.ndarray, "q k"], Float[np.ndarray, "q k"]]:
    """Rows and Euclidean distances of the k nearest keys of each query, nearest first (of equals, the first row first).

    Exact: a query that is one of the keys has distance 0. Raises: ConfigError for fewer than k keys, or features that
    are not finite.
    """
    check_rows(queries, "queries", 1)
    check_rows(keys, "keys", k)
    _, rows = _neighbours(queries, keys, k, mesh)
    # The distances that chose them are differences of large numbers; these are not.
    distances = np.stack([np.linalg.norm(np.subtract(queries, keys[i], dtype=np.float64), axis=1) for i in rows.T], 1)
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(rows, order, 1), np.take_along_axis(distances, order, 1)


def precision_recall(real: Features, fake: Features, mesh: Mesh, *, k: int = 3) -> dict[str, float]:
    """{"precision": share of `fake` within the manifold of `real`, "recall": share of `real` within that of `fake`}.

    The manifold of a set is the union of balls about its rows that reach to their k-th nearest neighbour in the set.
    Raises: ConfigError for sets of k rows or fewer, or features that are not finite.
    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991), eq. 1 to 3.
    """
    if k < 1:
        raise ConfigError(f"precision and recall with k = {k}: k has to be 1 at least")
    for rows, what in ((real, "real features"), (fake, "generated features")):
        check_rows(rows, what, k + 1)
    return {"precision": _covered(fake, real, k, mesh), "recall": _covered(real, fake, k, mesh)}


def _covered(queries: Features, keys: Features, k: int, mesh: Mesh) -> float:
    squared, _ = _neighbours(keys, keys, k + 1, mesh)  # the first is the row itself
    balls = {"rows": keys, "radius": squared[:, -1]}
    return float(over_pairs(_within, np.zeros(len(queries), bool), queries, balls, mesh).mean())


def _neighbours(queries: Features, keys: Features, k: int, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    start = np.full((len(queries), k), np.inf), np.full((len(queries), k), -1, np.int32)
    return over_pairs(_closer, start, queries, {"rows": keys, "index": np.arange(len(keys), dtype=np.int32)}, mesh)


def _closer(so_far: Neighbours, queries: Array, block: Block) -> Neighbours:
    (squared, index), n = so_far, len(queries)
    here = jnp.where(block["kept"][None], squared_distances(queries, block["rows"]), jnp.inf)
    index = jnp.concatenate([index, jnp.broadcast_to(block["index"][None], here.shape)], axis=1)

    def take(rest: Array, _: None) -> tuple[Array, Neighbours]:
        at = jnp.argmin(rest, axis=1)
        found = rest[jnp.arange(n), at], index[jnp.arange(n), at]
        return jnp.where(jnp.arange(rest.shape[1])[None] == at[:, None], jnp.inf, rest), found

    # k times the least: on a CPU ten times as fast as top_k of float64, which sorts.
    found = lax.scan(take, jnp.concatenate([squared, here], axis=1), None, length=squared.shape[1])[1]
    return found[0].T, found[1].T


def _within(so_far: Bool[Array, " q"], queries: Array, block: Block) -> Bool[Array, " q"]:
    inside = squared_distances(queries, block["rows"]) <= block["radius"][None]
    return so_far | (inside & block["kept"][None]).any(axis=1)
