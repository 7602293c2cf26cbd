"""The kernel distance (KID) of two sets of features."""

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxdiff.evaluation.pairs import Block, inner_products, over_pairs
from jaxdiff.evaluation.rows import check_rows

DRAWS = 2  # stream of the seeded generator; jaxdiff.data.pipeline and evaluation.judge have the others
Features = Float[np.ndarray, "n d"]


def squared_mmd(a: Features, b: Features, mesh: Mesh) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy of two sets, with the kernel (x y / d + 1)^3.

    It may be negative. Raises: ConfigError for less than two rows, or features that are not finite.
    Source: Binkowski et al. 2018 (arXiv 1801.01401), eq. 4 and sec. 4; Gretton et al. 2012, eq. 3.
    """
    for rows, what in ((a, "real features"), (b, "generated features")):
        check_rows(rows, what)
    return _within(a, mesh) + _within(b, mesh) - 2 * _kernel_sum(a, b, mesh) / (len(a) * len(b))


def kernel_distance(
    real: Features, fake: Features, mesh: Mesh, *, subsets: int = 100, most: int = 1000, seed: int = 0
) -> dict[str, float]:
    """{"kid": mean of `squared_mmd` over random subsets, "kid_low", "kid_high": its percentiles 2.5 and 97.5}.

    Each subset has min(most, half of the smaller set) rows of each set, drawn without repetition as a function of
    (seed, number of the subset). Raises: ConfigError for less than four rows, or features that are not finite.
    """
    for rows, what in ((real, "real features"), (fake, "generated features")):
        check_rows(rows, what, 4)
    size = min(most, len(real) // 2, len(fake) // 2)

    def draw(i: int) -> float:
        rng = np.random.default_rng((seed, DRAWS, i))
        a, b = (np.asarray(rows)[rng.choice(len(rows), size, replace=False)] for rows in (real, fake))
        return squared_mmd(a, b, mesh)

    values = [draw(i) for i in range(subsets)]
    low, high = np.percentile(values, (2.5, 97.5))
    return {"kid": float(np.mean(values)), "kid_low": float(low), "kid_high": float(high)}


def _within(rows: Features, mesh: Mesh) -> float:
    """The mean of the kernel over all pairs of two different rows."""
    n = len(rows)
    with_itself = (np.square(rows, dtype=np.float64).mean(axis=1) + 1) ** 3
    return (_kernel_sum(rows, rows, mesh) - float(with_itself.sum())) / (n * (n - 1))


def _kernel_sum(a: Features, b: Features, mesh: Mesh) -> float:
    return float(over_pairs(_add, np.zeros(len(a)), a, {"rows": b}, mesh).sum())


def _add(so_far: Float[Array, " q"], queries: Array, block: Block) -> Float[Array, " q"]:
    kernel = (inner_products(queries, block["rows"]) / queries.shape[1] + 1) ** 3
    return so_far + kernel @ block["kept"].astype(kernel.dtype)  # on a CPU twice as fast as sum
