"""Signals that end what has nothing to save."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

LATER = 0.02  # seconds
IGNORING = ("_xla_gc_callback", "__del__")


def raising(error: Callable[[int], BaseException]) -> Callable[[int, FrameType | None], None]:
    """A handler of signals that raises `error(signum)`.

    Where it interrupts JAX's callback of Python's garbage collector, or a finaliser, in which all that is raised is
    ignored, it sends the signal once more, a little later.
    """

    def handle(signum: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_name in IGNORING:
                again = threading.Timer(LATER, os.kill, (os.getpid(), signum))
                again.daemon = True
                again.start()
                return
            frame = frame.f_back
        raise error(signum)

    return handle


def on_interrupt() -> None:
    """Ctrl-C is a KeyboardInterrupt, as Python has it, that is never lost; where it is ignored, it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, raising(lambda _: KeyboardInterrupt()))
