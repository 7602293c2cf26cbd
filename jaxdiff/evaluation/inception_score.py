"""The inception score of a classifier's logits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jaxdiff import mesh as meshes
from jaxdiff.errors import ConfigError
from jaxdiff.evaluation.rows import check_rows


def inception_score(logits: Float[np.ndarray, "n classes"], mesh: Mesh, *, splits: int = 10) -> dict[str, float]:
    """{"is": mean, "is_std": standard deviation (divided by n) over `splits` parts in order of
    exp(mean_x KL(p(y|x), p(y)))}, where p(y|x) is the softmax of the logits and p(y) its mean over the part.

    Between 1 and the number of classes. Logits are equal on all processes.
    Raises: ConfigError for fewer rows than parts, or logits that are not finite.
    Source: Salimans et al. 2016 (arXiv 1606.03498), sec. 4.
    """
    if splits < 1:
        raise ConfigError(f"an inception score of {splits} parts: 1 at least")
    check_rows(logits, "logits", max(2, splits))
    n = len(logits)
    bounds = [i * n // splits for i in range(splits + 1)]
    size = -(-int(np.diff(bounds).max()) // mesh.size) * mesh.size  # one program for all parts
    with jax.enable_x64(True):
        parts = [_score(logits[low:high], size, mesh) for low, high in zip(bounds, bounds[1:], strict=False)]
    return {"is": float(np.mean(parts)), "is_std": float(np.std(parts))}


def _score(logits: Float[np.ndarray, "n classes"], size: int, mesh: Mesh) -> float:
    n = len(logits)
    batch = np.pad(logits, ((0, size - n), (0, 0))), np.arange(size) < n
    p, negative_entropy = (np.asarray(x) / n for x in _program(mesh)(*meshes.put_batch(batch, mesh)))
    return float(np.exp(negative_entropy - (p * np.log(np.where(p > 0, p, 1))).sum()))


@functools.cache
def _program(mesh: Mesh) -> Any:
    return jax.jit(_sums, out_shardings=meshes.replicated(mesh))


def _sums(
    logits: Float[Array, "n classes"], keep: Bool[Array, " n"]
) -> tuple[Float[Array, " classes"], Float[Array, ""]]:
    """Sums over rows of p and of p log p."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float64))
    p = jnp.exp(log_p) * keep[:, None]
    return p.sum(0), (p * log_p).sum()
