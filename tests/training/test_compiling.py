"""The step that is compiled beside other work: from which shapes, and what becomes of errors."""

import gc
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import mesh as meshes
from jaxdiff.data import device_batches, load_source, train_batches
from jaxdiff.training.compiling import Compiling, abstract_batch
from jaxdiff.training.stages import run_train


def test_shapes_are_those_of_the_batches(tiny):
    config = tiny("ddpm")
    source, mesh = load_source(config.data, "train"), meshes.make_mesh()
    for config.data.flip in (False, True):
        options = dict(seed=0, batch_size=config.batch_size, start=0, stop=1, flip=config.data.flip, threads=1)
        (batch,) = device_batches(train_batches(source, **options), meshes.batch_sharding(mesh))
        shapes = abstract_batch(source, config, mesh)
        described = {name: (x.shape, x.dtype, x.sharding) for name, x in batch.items()}
        assert {name: (s.shape, s.dtype, s.sharding) for name, s in shapes.items()} == described


def test_compiled_from_shapes_computes_the_same():
    function = jax.jit(lambda x: jnp.sin(x).sum())
    compiled, seconds = Compiling(function, jax.ShapeDtypeStruct((5,), jnp.float32)).result()
    x = np.arange(5, dtype=np.float32)
    assert compiled(x) == function(x) and 0 < seconds < 60


def stand_in(compile):
    return SimpleNamespace(trace=lambda: SimpleNamespace(jaxpr=None, lower=lambda: SimpleNamespace(compile=compile)))


def test_others_go_on_meanwhile_and_xla_fails_where_it_is_waited_for():
    go_on = threading.Event()

    def fail():
        assert go_on.wait(30)
        raise RuntimeError("RESOURCE_EXHAUSTED")

    compiling = Compiling(stand_in(fail))  # would not return if it waited
    go_on.set()
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        compiling.result()


def test_what_cannot_be_traced_fails_at_once():
    with pytest.raises(TypeError, match="shapes"):
        Compiling(jax.jit(lambda x, y: x + y), jnp.ones(2), jnp.ones(3))


def test_garbage_is_collected_but_while_tracing():
    seen = []

    def function(x):
        seen.append(gc.isenabled())
        return x + 1

    Compiling(jax.jit(function), jnp.ones(2)).result()
    assert seen == [False] and gc.isenabled()
    with pytest.raises(TypeError, match="shapes"):
        Compiling(jax.jit(lambda x, y: x + y), jnp.ones(2), jnp.ones(3))
    assert gc.isenabled()


def test_data_that_fail_meanwhile_end_the_run(tiny, tmp_path, monkeypatch):
    """The error of the data is what is seen, not that the step compiles."""

    def unreadable(*args, **kwargs):
        raise OSError("unreadable")

    monkeypatch.setattr("jaxdiff.training.experiments.train_batches", unreadable)
    config = tiny("ddpm")
    config.model.update(channel_mult=(1,), attention_resolutions=(), mid_attention=False, context_tokens=0)
    with pytest.raises(OSError, match="unreadable"):
        run_train(config, tmp_path / "run")
