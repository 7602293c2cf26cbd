"""Which form of the same function networks compute, the fast one or the plain one that it is compared with, and for
which hardware."""

import os

import jax

from jaxdiff.errors import ConfigError

VARIABLE = "JAXDIFF_FORMS"
CAPABILITY: float | None = None  # of the GPU that programs are for where JAX has none: benchmarks.planned


def plain() -> bool:
    """Whether JAXDIFF_FORMS=plain is set: no kernels of our own, and convolutions as they are written down.

    Raises: ConfigError for another value.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "plain"):
        raise ConfigError(f"{VARIABLE} = {value}: must be plain or not set")
    return value == "plain"


def for_gpu() -> bool:
    """Whether programs are for GPUs."""
    return CAPABILITY is not None or jax.default_backend() == "gpu"


def capability() -> float:
    """The compute capability of the NVIDIA GPUs that programs are for; 0 where they are not for such."""
    if CAPABILITY is not None:
        return CAPABILITY
    text = getattr(jax.local_devices()[0], "compute_capability", "") if for_gpu() else ""
    return float(text) if text.replace(".", "").isdigit() else 0.0


def multiprocessors() -> int:
    """Of the GPU that programs are for."""
    return 132 if CAPABILITY is not None else jax.local_devices()[0].core_count
