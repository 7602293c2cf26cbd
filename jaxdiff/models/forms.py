"""Which form of the same function networks compute, the fast one or the plain one that it is compared with, and for
which hardware."""

import contextlib
import contextvars
import os
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax

from jaxdiff.errors import ConfigError

VARIABLE = "JAXDIFF_FORMS"
CAPABILITY: float | None = None  # of the GPU that programs are for where JAX has none: benchmarks.planned
_DISCARDED = contextvars.ContextVar("discarded", default=False)


def plain() -> bool:
    """Whether JAXDIFF_FORMS=plain is set: no kernels of our own, and convolutions as they are written down.

    Raises: ConfigError for another value.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "plain"):
        raise ConfigError(f"{VARIABLE} = {value}: must be plain or not set")
    return value == "plain"


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """No kernels of our own in what is traced within: for what is thrown away, as all that an initialisation computes
    of images. To build one takes a tenth of a second."""
    token = _DISCARDED.set(True)
    try:
        yield
    finally:
        _DISCARDED.reset(token)


def with_kernels() -> bool:
    """Whether kernels of our own may be used."""
    return not (_DISCARDED.get() or plain())


def abstract_init(model: nn.Module, *example: Any) -> Any:
    """Shapes and dtypes of a model's parameters, of what it is called with."""
    with without_kernels():
        return jax.eval_shape(model.init, jax.random.key(0), *example)


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
