"""The Frechet distance of two sets of features, each summed up on the devices as it comes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float

from jaxdiff import mesh as meshes
from jaxdiff.errors import ConfigError
from jaxdiff.evaluation.rows import refuse_broken


class Sums(NamedTuple):
    """What `Moments` keeps, float64: numbers of rows, and sums of the rows' differences from the first of them."""

    rows: Float[Array | np.ndarray, ""]
    broken: Float[Array | np.ndarray, ""]  # rows that are not finite
    first: Float[Array | np.ndarray, " d"]
    total: Float[Array | np.ndarray, " d"]
    products: Float[Array | np.ndarray, "d d"]


class Moments:
    """Mean and covariance of rows of features [n, d] that come in pieces, accumulated in float64."""

    def __init__(self, what: str = "features", sums: Sums | None = None) -> None:
        self._what = what  # in messages
        self._sums = sums

    @property
    def sums(self) -> Sums | None:
        """What is kept, to go on from with another `Moments`; None before the first row."""
        return self._sums

    @property
    def count(self) -> int:
        """The number of rows so far."""
        return 0 if self._sums is None else int(self._sums.rows)

    def add(
        self, features: Float[Array | np.ndarray, "n d"], keep: Bool[Array | np.ndarray, " n"] | None = None
    ) -> None:
        """Take up some rows, or those of them where `keep` is true (or not 0).

        Rows of a global array are summed on the devices that hold them; a numpy array has to be equal on all processes.
        """
        n, d = features.shape
        if not n:
            return
        if self._sums is None:
            self._sums = Sums(np.zeros(()), np.zeros(()), np.zeros(d), np.zeros(d), np.zeros((d, d)))
        sharding = getattr(features, "sharding", None)
        mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
        with jax.enable_x64(True):
            self._sums = _program(mesh)(self._sums, features, np.ones(n, bool) if keep is None else keep)

    def result(self) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
        """Mean and covariance (divided by n - 1).

        Raises: ConfigError for less than two rows, or any that are not finite.
        """
        n = self.count
        if self._sums is None or n < 2:
            raise ConfigError(f"{self._what}: {n} rows have no covariance")
        broken, first, total, products = (np.asarray(x) for x in self._sums[1:])
        refuse_broken(int(broken), n, self._what)
        mean = total / n
        return first + mean, (products - n * np.outer(mean, mean)) / (n - 1)


@functools.cache
def _program(mesh: Mesh | None) -> Any:
    return jax.jit(_add, out_shardings=None if mesh is None else meshes.replicated(mesh))


def _add(sums: Sums, rows: Array, keep: Array) -> Sums:
    keep, rows = keep > 0, rows.astype(jnp.float64)
    # Products of differences from any one row lose fewer digits than those of the rows.
    first = jnp.where(sums.rows > 0, sums.first, rows[jnp.argmax(keep)])
    broken = keep & ~jnp.isfinite(rows).all(axis=1)
    rows = jnp.where(keep[:, None], rows - first[None], 0)
    products = jnp.einsum("ni,nj->ij", rows, rows, precision="highest")
    total = sums.total + rows.sum(0)
    return Sums(sums.rows + keep.sum(), sums.broken + broken.sum(), first, total, sums.products + products)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of the moments of two sets of features.

    The trace of the root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric, so
    that covariances without full rank need no special care. Computed on the host. Raises: as `Moments.result`.
    Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a.result(), b.result()
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_b @ root)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.maximum(cross, 0)).sum()
    return float(np.square(mean_a - mean_b).sum() + trace)
