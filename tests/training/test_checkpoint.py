"""Checkpoints: what is kept, what comes back, and what is said when there is none."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.layout import Format, Layout

from jaxdiff import mesh as meshes
from jaxdiff.errors import ConfigError
from jaxdiff.training import checkpoint
from jaxdiff.training.checkpoint import Checkpoints, in_order
from jaxdiff.training.optimizer import make_optimizer
from jaxdiff.training.step import TrainState


def state_at(step, mesh=None):
    params = {"w": jnp.arange(16.0) + step, "b": {"x": jnp.full((2, 3), step, jnp.float32)}}
    optimizer = make_optimizer(lambda n: 1e-3, 1e-4, 1.0)
    state = TrainState(jnp.int32(step), params, jax.tree.map(lambda x: x / 2, params), optimizer.init(params))
    return meshes.put_replicated(state, mesh or meshes.make_mesh())


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save_all(folder, losses, keep=2):
    checkpoints = Checkpoints(folder, keep)
    for step, loss in losses.items():
        checkpoints.save(state_at(step), {"data": {"batches": step}, "class_names": ["a"]}, loss)
    checkpoints.close()


def test_the_last_few_and_the_best_are_kept(tmp_path):
    save_all(tmp_path, {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5, 50: 2.0})
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [20, 40, 50] and checkpoints.latest == 50


def test_whoever_goes_on_keeps_as_many(tmp_path):
    save_all(tmp_path, {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5})
    save_all(tmp_path, {50: np.inf, 60: 2.0})
    assert Checkpoints(tmp_path).steps == [20, 50, 60]
    save_all(tmp_path, {70: 0.5, 80: np.inf})
    save_all(tmp_path, {90: 0.7, 100: 0.8})
    assert Checkpoints(tmp_path).steps == [70, 90, 100]


def test_what_an_earlier_version_saved_or_is_damaged_is_kept(tmp_path, monkeypatch):
    """Any of these may be the best."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "MONITOR", "other")
        save_all(tmp_path, {10: 1.0, 20: 2.0, 30: 3.0})
    (damaged,) = (tmp_path / "checkpoints" / "20" / "meta").glob("*metadata")
    damaged.write_text("{")
    save_all(tmp_path, {40: 2.0, 50: np.inf, 60: np.inf, 70: np.inf})
    assert Checkpoints(tmp_path).steps == [10, 20, 30, 40, 60, 70]


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path):
    save_all(tmp_path, {10: 0.5, 20: 0.4, 30: np.nan, 40: np.nan, 50: 0.9, 60: np.inf})
    assert Checkpoints(tmp_path).steps == [20, 50, 60]


@pytest.mark.parametrize("item", ["params", "meta"])
def test_a_damaged_checkpoint_is_one_line_that_says_what_is_left(tmp_path, item):
    save_all(tmp_path, {10: 1.0, 20: 2.0})
    for file in (tmp_path / "checkpoints" / "20" / item).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:20])
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = abstract(state_at(0))
    reads = [lambda: checkpoints.restore(state)]
    reads += [lambda: checkpoints.meta()] if item == "meta" else []
    reads += [lambda: checkpoints.restore_params(state.params, None, "raw")] if item == "params" else []
    for read in reads:
        words = "checkpoints/20: cannot be read .* it is damaged, or .*; without that folder step 10 is the newest"
        with pytest.raises(ConfigError, match=words) as error:
            read()
        assert "\n" not in str(error.value)
    checkpoints.close()


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path):
    """As on a full disk; nothing half written counts, and whoever begins again is not in its way."""
    resource = pytest.importorskip("resource")
    noise = np.random.default_rng(0).normal(size=50_000).astype(np.float32)  # which does not compress
    state = state_at(10)._replace(params=meshes.put_replicated({"w": noise}, meshes.make_mesh()))
    checkpoints = Checkpoints(tmp_path, keep=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        checkpoints.save(state, {}, 1.0)
        for finish in (checkpoints.wait, checkpoints.close):
            with pytest.raises(ConfigError, match="checkpoints: a checkpoint cannot be written .File too large.; "):
                finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Checkpoints(tmp_path).latest is None
    save_all(tmp_path, {10: 1.0})
    assert Checkpoints(tmp_path).steps == [10]


def test_everything_comes_back(tmp_path):
    save_all(tmp_path, {10: 1.0})
    state = state_at(10)
    checkpoints = Checkpoints(tmp_path, keep=2)
    got, meta = checkpoints.restore(abstract(state))
    jax.tree.map(np.testing.assert_array_equal, got, state)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    assert meta == {"data": {"batches": 10}, "class_names": ["a"]}
    checkpoints.close()


def test_the_critic_comes_back_too(tmp_path):
    state = state_at(10)
    critic = {"discriminator": {"w": jnp.arange(3.0)}, "logvar": jnp.float32(-1)}
    optimizer = make_optimizer(lambda n: 1e-3, 0.0, 1.0)
    state = state._replace(
        **meshes.put_replicated({"critic": critic, "critic_opt_state": optimizer.init(critic)}, meshes.make_mesh())
    )
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state, {})
    checkpoints.wait()
    got, _ = checkpoints.restore(abstract(state))
    jax.tree.map(np.testing.assert_array_equal, got, state)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    # Sampling and encoding read the averaged parameters alone.
    np.testing.assert_array_equal(checkpoints.restore_params(abstract(state.ema), None, "ema")["w"], state.ema["w"])
    checkpoints.close()


def test_restores_onto_other_devices(tmp_path):
    save_all(tmp_path, {10: 1.0})
    one = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[3:4])
    got, _ = Checkpoints(tmp_path).restore(abstract(state_at(10, one)))
    assert got.params["w"].sharding.device_set == {jax.devices()[3]}
    np.testing.assert_array_equal(got.params["w"], np.arange(16.0) + 10)


@pytest.mark.parametrize(("weights", "factor"), [("raw", 1.0), ("ema", 0.5)])
def test_parameters_alone(tmp_path, weights, factor):
    save_all(tmp_path, {10: 1.0, 20: 2.0})
    got = Checkpoints(tmp_path).restore_params(abstract(state_at(0).params), 10, weights)
    np.testing.assert_array_equal(got["w"], factor * (np.arange(16.0) + 10))


def test_one_line_says_which_steps_there_are(tmp_path):
    save_all(tmp_path, {10: 1.0, 20: 2.0})
    with pytest.raises(ConfigError, match=r"--step=15: .* has steps 10, 20$"):
        Checkpoints(tmp_path).pick(15)
    assert Checkpoints(tmp_path).pick(None) == 20


def test_reading_where_nothing_was_written_makes_nothing(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        Checkpoints(tmp_path / "none").pick(None)
    assert not (tmp_path / "none").exists()


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(state_at(10), {"n": 1}, 1.0)
    checkpoints.save(state_at(10), {"n": 2}, 1.0)
    assert checkpoints.meta() == {"n": 1}
    checkpoints.close()


def test_training_goes_on_while_a_checkpoint_is_saved(tmp_path, monkeypatch):
    """What is written is the state as it was, whatever becomes of its memory; and whoever reads waits for it."""
    go, save = threading.Event(), ocp.CheckpointManager.save

    def slowly(*args, **options):
        assert go.wait(60)
        return save(*args, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", slowly)
    checkpoints, state, want = Checkpoints(tmp_path, keep=2), state_at(10), jax.device_get(state_at(10))
    checkpoints.save(state, {}, 1.0)
    reused = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)(state)
    go.set()
    got, _ = checkpoints.restore(abstract(reused))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    checkpoints.close()


def test_what_goes_wrong_while_saving_is_raised(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("No space left on device")

    checkpoints = Checkpoints(tmp_path, keep=2)
    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    checkpoints.save(state_at(10), {}, 1.0)
    for use in (checkpoints.wait, lambda: checkpoints.save(state_at(20), {}, 1.0), checkpoints.close):
        with pytest.raises(ConfigError, match="No space left"):
            use()


def test_arrays_in_order():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    plain = jnp.arange(24.0).reshape(2, 3, 4)
    state = {"odd": jax.device_put(plain, Format(Layout((2, 0, 1)), sharding)), "plain": plain}
    got = in_order(state)
    assert state["odd"].format.layout.major_to_minor == (2, 0, 1) and got["plain"] is plain
    assert got["odd"].format.layout.major_to_minor == (0, 1, 2)
    np.testing.assert_array_equal(got["odd"], plain)
