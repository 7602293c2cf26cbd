"""Numbers and settings as people read them."""

import datetime
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jaxdiff.report.reading import number


def figures(value: Any, digits: int = 4) -> str:
    """A number with `digits` significant ones, a dash where there is none: 12,345 and 0.06649."""
    if number(value) is None:
        return "–"
    if isinstance(value, int):
        text = f"{value:,}"
    elif abs(value) >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits}g}"
    return text.replace("-", "−")


def decimals(values: Iterable[Any], digits: int = 4) -> int:
    """Decimals that give the greatest of `values` that many significant digits, so that a column is aligned."""
    finite = [abs(v) for v in values if number(v) is not None and v]
    return max(0, min(6, digits - 1 - math.floor(math.log10(max(finite))))) if finite else 0


def fixed(value: Any, places: int) -> str:
    """A number with so many decimals, a dash where there is none."""
    return "–" if number(value) is None else f"{value:,.{places}f}".replace("-", "−")


def duration(seconds: Any) -> str:
    """Seconds as 0.84 s, 12.3 s, 3 min 12 s or 2 h 5 min."""
    if number(seconds) is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:,} h {minute} min" if hours else f"{minutes} min {second} s"


def moment(value: Any) -> str:
    """A time, ISO or seconds since 1970, as 2025-11-24 13:30; as it is where it is neither."""
    try:
        if isinstance(value, int | float):
            return datetime.datetime.fromtimestamp(value).strftime("%Y-%m-%d %H:%M")
        return datetime.datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return str(value)


def setting(value: Any) -> str:
    """A value of a config or a protocol."""
    if value is None:
        return "–"
    if value == "":
        return "empty"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}".replace("-", "−")
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(setting, value)) + ")"
    return str(value)


def drawn(protocol: Mapping[str, Any]) -> str:
    """How samples were drawn, as in "ddim, 50 steps, w = 2, ema"; of a protocol or of config fields `sample`."""
    parts = [str(protocol["sampler"])] if protocol.get("sampler") else []
    if protocol.get("steps"):
        parts.append(f"{protocol['steps']} steps")
    if protocol.get("guidance") is not None:
        parts.append(f"w = {setting(protocol['guidance'])}")
    if protocol.get("eta"):
        parts.append(f"eta = {setting(protocol['eta'])}")
    if protocol.get("weights"):
        parts.append(f"{protocol['weights']} weights")
    return ", ".join(parts)
