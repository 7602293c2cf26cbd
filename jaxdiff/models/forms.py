"""Which form of the same function networks compute: the fast ones, or the plain ones that those are compared with."""

import os

from jaxdiff.errors import ConfigError

VARIABLE = "JAXDIFF_FORMS"


def plain() -> bool:
    """Whether JAXDIFF_FORMS=plain is set: no kernels of our own, and convolutions as they are written down.

    Raises: ConfigError for another value.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "plain"):
        raise ConfigError(f"{VARIABLE} = {value}: must be plain or not set")
    return value == "plain"
