"""What ends a run in one line."""

from collections.abc import Sequence


class ConfigError(ValueError):
    """Something the user can mend; the message is one line naming the field, its value, and what is allowed."""


class Stopped(Exception):
    """Training was asked to stop and has saved its state; `signum` says by which signal (0 = by the caller)."""

    def __init__(self, step: int, total: int, signum: int) -> None:
        super().__init__(f"stopped and saved at step {step:,} of {total:,}; the same command goes on from there")
        self.signum = signum


class Interrupted(BaseException):
    """Stopped where nothing is trained: what is finished is in its files. Nothing that catches errors catches it."""

    def __init__(self, signum: int) -> None:
        super().__init__("stopped; what is finished is kept, the same command goes on from there")
        self.signum = signum


def shortened(names: Sequence[str], most: int = 5) -> str:
    """The first of the names, for a message."""
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])
