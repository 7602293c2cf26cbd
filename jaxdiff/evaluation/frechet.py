"""The Frechet distance of two sets of features, each summed up as it comes."""

import numpy as np
from jaxtyping import Float


class Moments:
    """Mean and covariance of rows of features [n, d] that come in pieces, accumulated in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._first, self._sum, self._products = np.zeros(()), np.zeros(()), np.zeros(())

    def add(self, features: Float[np.ndarray, "n d"]) -> None:
        """Take up some rows."""
        rows = np.asarray(features, np.float64)
        if not self.count and len(rows):
            self._first = rows[0]  # products of differences from any one row lose fewer digits than those of the rows
        rows = rows - self._first
        self.count += len(rows)
        self._sum = self._sum + rows.sum(0)
        self._products = self._products + rows.T @ rows

    def result(self) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
        """Mean and covariance (divided by n - 1).

        Raises: ValueError for less than two rows.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} rows have no covariance")
        mean = self._sum / self.count
        covariance = (self._products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return self._first + mean, covariance


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of the moments of two sets of features.

    The trace of the root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric, so
    that covariances without full rank need no special care. Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a.result(), b.result()
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_b @ root)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.maximum(cross, 0)).sum()
    return float(np.square(mean_a - mean_b).sum() + trace)
