"""What every score asks of the features that it is computed of."""

import numpy as np
from jaxtyping import Float

from jaxdiff.errors import ConfigError


def check_rows(rows: Float[np.ndarray, "n d"], what: str, least: int = 2) -> None:
    """Refuse rows that are not finite, or fewer than `least` of them.

    Raises: ConfigError that says how many of how many rows of `what` ("real features", ...).
    """
    refuse_broken(len(rows) - int(np.isfinite(rows).all(axis=1).sum()), len(rows), what)
    if len(rows) < least:
        raise ConfigError(f"{what}: {len(rows)} rows, where the score needs {least} at least")


def refuse_broken(broken: int, count: int, what: str) -> None:
    """Raises: ConfigError when `broken`, the number of rows that are not finite, is not 0."""
    if broken:
        raise ConfigError(f"{what}: {broken:,} of {count:,} rows are not finite, so that no score is computed of them")
