"""What checks of a config are made of: one line for a value that is not allowed."""

import difflib
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from jaxdiff.errors import ConfigError


def require(ok: bool, field: str, value: Any, allowed: str) -> None:
    """ConfigError "config.<field> = <value>: must be <allowed>" unless `ok`."""
    if not ok:
        raise ConfigError(f"config.{field} = {value!r}: must be {allowed}")


def one_of(config: ConfigDict, field: str, allowed: Collection[str]) -> None:
    """ConfigError unless the field "a.b" is in `allowed`, with what comes close to it."""
    value = get_field(config, field)
    close = difflib.get_close_matches(str(value), allowed, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    require(value in allowed, field, value, f"one of {', '.join(allowed)}{hint}")


def at_least(config: ConfigDict, bound: float, *fields: str) -> None:
    """ConfigError naming the first of the fields that is below the bound."""
    for field in fields:
        value = get_field(config, field)
        require(value >= bound, field, value, f"at least {bound}")


def get_field(config: ConfigDict, field: str) -> Any:
    """The value of the field "a.b"."""
    for part in field.split("."):
        config = config[part]
    return config
