"""Compilation apart from the parts that compile."""

import time

import jax
import jax.numpy as jnp

from jaxdiff.clock import Stopwatch


def test_compiling_is_not_counted_to_the_part():
    watch, x = Stopwatch(), jnp.arange(7.0)

    @jax.jit
    def slow_to_trace(x):
        time.sleep(0.2)
        return x * 3 + 1

    with watch.part("first"):
        slow_to_trace(x).block_until_ready()
    assert watch.seconds["compile"] > 0.2 > watch.seconds["first"] > 0
    compiled = watch.seconds["compile"]
    for _ in range(2):
        with watch.part("second"):
            slow_to_trace(x).block_until_ready()
            time.sleep(0.05)
    assert watch.seconds["compile"] == compiled and watch.seconds["second"] > 0.1
