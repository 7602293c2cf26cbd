"""Signals that end what has nothing to save are never lost."""

import gc
import signal
import time

import pytest

from jaxdiff.errors import Interrupted
from jaxdiff.interrupts import raising


@pytest.fixture
def handled():
    old = signal.signal(signal.SIGUSR1, raising(Interrupted))
    yield
    signal.signal(signal.SIGUSR1, old)


@pytest.mark.usefixtures("handled")
def test_at_once():
    with pytest.raises(Interrupted) as error:
        signal.raise_signal(signal.SIGUSR1)
    assert error.value.signum == signal.SIGUSR1


class Finalised:
    def __init__(self):
        self.cycle = self  # so that the collector finalises it

    def __del__(self):
        signal.raise_signal(signal.SIGUSR1)


def _xla_gc_callback(phase, info):
    if phase == "start":
        signal.raise_signal(signal.SIGUSR1)


@pytest.mark.usefixtures("handled")
@pytest.mark.parametrize("kind", ["callback", "finaliser"])
def test_later_where_it_would_be_lost(kind):
    """JAX cleans up in a callback of this name, and Python ignores what is raised there, and in finalisers."""
    gc.collect()  # finalisers of others
    if kind == "callback":
        gc.callbacks.append(_xla_gc_callback)
    else:
        Finalised()
    with pytest.raises(Interrupted):
        try:
            gc.collect()
        finally:
            if kind == "callback":
                gc.callbacks.remove(_xla_gc_callback)
        time.sleep(5)


def test_jax_s_callback_has_that_name():
    import jax

    assert "_xla_gc_callback" in [getattr(callback, "__name__", "") for callback in gc.callbacks], jax.__version__
