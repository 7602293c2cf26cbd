"""Averages beside `ema`: what they are of, other widths after training, and what a run keeps of them."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdiff import mesh as meshes
from jaxdiff.config import check, files
from jaxdiff.errors import ConfigError
from jaxdiff.generator import Generator
from jaxdiff.sampling import load_generator, run_sample
from jaxdiff.startup import workdir_config
from jaxdiff.training import averages
from jaxdiff.training.checkpoint import Checkpoints, state_items
from jaxdiff.training.optimizer import make_optimizer
from jaxdiff.training.snapshots import Snapshots, averaged_from, state_weights
from jaxdiff.training.step import TrainState, new_state

STEPS, WIDTHS = 12, (0.05, 0.1)


def profile(gamma, at, steps):
    """Weights of the steps 1..steps in the average at a step, in float64."""
    edges = np.minimum(np.arange(steps + 1) / at, 1) ** (gamma + 1)
    return np.diff(edges)


@pytest.fixture(scope="module")
def walk():
    """A random walk of 32 parameters, one of which stays where it is: [200, 32]."""
    steps = np.random.default_rng(0).standard_normal((200, 32))
    steps[:, 0] = 0
    return (1 + np.cumsum(steps, axis=0)).astype(np.float32)


@pytest.fixture(scope="module")
def tracked(walk):
    """sigma_rel -> the averages [200, 32] that training would have of the walk, after each step."""

    @jax.jit
    def track(gamma):
        def one(average, item):
            average = averages.power_update(average, item[1], item[0], gamma)
            return average, average

        return jax.lax.scan(one, jnp.full(32, 7.0), (jnp.arange(len(walk)), walk))[1]

    return lambda sigma_rel: np.asarray(track(averages.gamma_of(sigma_rel)))


def test_widths_and_exponents():
    assert averages.gamma_of(0.05) == pytest.approx(16.97, abs=0.01)  # EDM2, section 3.1
    assert averages.gamma_of(0.10) == pytest.approx(6.94, abs=0.01)
    for sigma_rel in (0.001, 0.02, 0.2, averages.WIDEST):
        gamma = averages.gamma_of(sigma_rel)
        assert gamma > 0 and averages.sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-9)
        tau, p = np.arange(100_000) + 0.5, profile(gamma, 100_000, 100_000)
        mean = p @ tau
        assert np.sqrt(p @ (tau - mean) ** 2) / 100_000 == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_the_recurrence_is_the_power_function(walk, tracked, sigma_rel):
    gamma = averages.gamma_of(sigma_rel)
    for at in (1, 2, 37, 200):
        expected = profile(gamma, at, 200) @ walk
        np.testing.assert_allclose(tracked(sigma_rel)[at - 1], expected, atol=2e-5)


def test_the_rate_has_its_digits_at_many_steps():
    rate = averages.power_update(jnp.float32(0), jnp.float32(1), jnp.int32(2_999_999), 6.94)
    assert float(rate) == pytest.approx(-np.expm1(7.94 * np.log1p(-1 / 3e6)), rel=1e-6)


def reconstructed(tracked, sigma_rel, at, every):
    """From snapshots up to a step, and the relative error of the profile."""
    steps = [t for t in range(every, at + 1, every) for _ in WIDTHS]
    stored = [tracked(s)[t - 1] for t in range(every, at + 1, every) for s in WIDTHS]
    gammas = [averages.gamma_of(s) for s in WIDTHS] * (len(steps) // 2)
    weights, error = averages.solve_weights(steps, gammas, at, averages.gamma_of(sigma_rel))
    assert weights.dtype == np.float64 and weights.sum() == pytest.approx(1, abs=1e-12)
    own = np.stack([profile(g, t, 200) for g, t in zip(gammas, steps, strict=True)])
    wanted = profile(averages.gamma_of(sigma_rel), at, 200)
    measured = np.linalg.norm(weights @ own - wanted) / np.linalg.norm(wanted)
    return averages.weighted_sum(weights.tolist(), stored), error, measured


@pytest.mark.parametrize("sigma_rel", WIDTHS)
@pytest.mark.parametrize("at", [100, 200])
def test_what_was_tracked_comes_out_exactly(tracked, sigma_rel, at):
    got, error, measured = reconstructed(tracked, sigma_rel, at, 10)
    np.testing.assert_allclose(got, tracked(sigma_rel)[at - 1], rtol=1e-6)
    assert error < 1e-6 and measured < 1e-12


@pytest.mark.parametrize(
    ("sigma_rel", "bounds"), [(0.03, (0.08, 0.03)), (0.07, (0.01, 3e-3)), (0.08, (8e-3, 2e-3)), (0.2, (0.06, 0.02))]
)
def test_other_widths_come_close(walk, tracked, sigma_rel, bounds):
    """The bounds are of the profile, with 10 and 20 snapshots; the parameters follow it."""
    direct = tracked(sigma_rel)[-1]
    for every, bound in zip((20, 10), bounds, strict=True):
        got, error, measured = reconstructed(tracked, sigma_rel, 200, every)
        assert measured < 1.05 * error and error < bound
        assert np.abs(got - direct).max() < bound * np.ptp(walk, axis=0).max()
        assert got[0] == pytest.approx(1, abs=1e-6)  # the parameter that does not move
        assert measured > 1e-4  # which the other bounds would not show, were the profile the tracked one's


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ("ema", "ema"),
        ("raw", "raw"),
        ("ema:0.50", "ema:0.5"),
        ("sigma_rel:0.1", "sigma_rel:0.1"),
        ("sigma_rel:0.07", 0.07),
        *(
            (name, None)
            for name in ("", "best", "ema:0.9", "raw:0.5", "sigma_rel:0", "sigma_rel:0.29", "sigma_rel:nan")
        ),
    ],
)
def test_names_of_weights(tiny, weights, wanted):
    config = tiny("ddpm")
    config.update(ema_decays=(0.5,), ema_sigma_rel=WIDTHS)
    if wanted is None:
        there = "ema, raw, ema:0.5, sigma_rel:0.05, sigma_rel:0.1, sigma_rel:WIDTH with a width in"
        with pytest.raises(ConfigError, match=f"config.sample.weights = '{weights}': must be one of {there}"):
            averages.parse_weights(weights, config)
    else:
        assert averages.parse_weights(weights, config) == wanted


def test_a_training_draws_with_what_it_tracks(tiny):
    config = tiny("ddpm")
    config.update(ema_sigma_rel=WIDTHS)
    config.sample.weights = "sigma_rel:0.05"
    check.validate(config, 8)
    config.sample.weights = "sigma_rel:0.06"
    check.validate_sample(config)
    with pytest.raises(ConfigError, match="config.sample.weights = 'sigma_rel:0.06': must be one that is tracked"):
        check.validate(config, 8)
    state = TrainState(np.int32(0), "p", "e", (), averages={"sigma_rel:0.05": "s", "sigma_rel:0.1": "t"})
    assert [state_weights(state, name, config) for name in ("ema", "raw", "sigma_rel:0.10")] == ["e", "p", "t"]


def test_none_are_tracked_unless_asked_for(tiny):
    optimizer, params = make_optimizer(lambda n: 1e-3, 0.0, 1.0), {"w": jnp.ones(2)}
    state = new_state(params, optimizer, jax.random.key(0), averages=averages.updates(tiny("ddpm")))
    assert state.averages == () and set(state_items(state)) == {"params", "ema", "optimizer"}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A workdir as training leaves it at step 12, with snapshots every 3 steps, of parameters that walk at random; and
    these parameters by step."""
    workdir = tmp_path_factory.mktemp("averages") / "run"
    config = tiny("ddpm")
    config.model.update(channels=8, channel_mult=(1,), attention_resolutions=(), mid_attention=False)
    config.update(steps=STEPS, ema_decays=(0.5,), ema_sigma_rel=WIDTHS, ema_snapshot_every=3)
    config.sample.update(num=8, batch_size=8, steps=2)
    check.validate(config, 8)
    workdir.mkdir()
    files.save(config, workdir / "config.json")
    mesh = meshes.make_mesh()
    leaves, structure = jax.tree.flatten(Generator(config, (8, 8, 3), 10, mesh).abstract_params())
    rng = np.random.default_rng(0)
    params = [0.1 * np.cumsum(rng.standard_normal((STEPS + 1, *leaf.shape)), axis=0) for leaf in leaves]
    params = jax.tree.unflatten(structure, [x.astype(np.float32) for x in params])
    by = averages.updates(config)
    advance = jax.jit(lambda now, params, n: averages.update_all(now, params, n, by))
    now = averages.new_averages(by, at_step(params, 0))
    for n in range(STEPS):
        now = advance(now, at_step(params, n + 1), jnp.int32(n))
        if (n + 1) % 3 == 0:
            Snapshots(workdir).save(n + 1, {name: now[name] for name in averages.widths(config)})
    raw = at_step(params, STEPS)
    state = TrainState(jnp.int32(STEPS), raw, jax.tree.map(jnp.negative, raw), {"x": jnp.ones(2)}, averages=now)
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(meshes.put_replicated(state, mesh), {"class_names": list("0123456789"), "shape": [8, 8, 3]})
    checkpoints.close()
    return workdir, params


def at_step(params, step):
    return jax.tree.map(lambda x: x[step], params)


def load(workdir, weights):
    config = workdir_config(workdir, None, {"sample.weights": weights})
    return load_generator(config, workdir, meshes.make_mesh(), None)[1]


def assert_close(tree, weights, params, atol):
    """A tree is the sum of the parameters of steps 1, 2, ... with these weights."""
    jax.tree.map(lambda x, p: np.testing.assert_allclose(x, np.tensordot(weights, p[1:], 1), atol=atol), tree, params)


def test_each_name_gives_its_average(whole):
    workdir, params = whole
    halves = np.zeros(STEPS)
    for n in range(STEPS):
        decay = min(0.5, (1 + n) / (10 + n))
        halves = decay * halves
        halves[n] = 1 - decay
    assert_close(load(workdir, "ema:0.50"), halves, params, 1e-5)  # the start's share is 4e-6
    assert_close(load(workdir, "raw"), np.eye(STEPS)[-1], params, 0)
    assert_close(load(workdir, "ema"), -np.eye(STEPS)[-1], params, 0)
    for sigma_rel, atol in ((0.05, 1e-6), (0.1, 1e-6), (0.07, 0.01), (0.2, 0.05)):
        restored = load(workdir, f"sigma_rel:{sigma_rel}")
        assert_close(restored, profile(averages.gamma_of(sigma_rel), STEPS, STEPS), params, atol)
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(restored))


def test_samples_of_a_width_that_was_not_tracked(whole, capsys):
    workdir, _ = whole
    config = workdir_config(workdir, None, {"sample.weights": "sigma_rel:0.07"})
    check.validate_sample(config)
    (sheet,) = run_sample(config, workdir, None)
    assert sheet.name == f"step{STEPS}-sigma_rel-0.07-ddim2-w0-seed0.png"
    assert f"sigma_rel 0.07 at step {STEPS}: of 8 averages, profile off by" in capsys.readouterr().out
    with np.load(sheet.with_suffix(".npz")) as data:
        assert data["arr_0"].shape == (8, 8, 8, 3)
    sources = {"averages": {"sigma_rel": [0.05, 0.1], "steps": [3, 5]}}
    assert averaged_from(config, workdir, config.sample, 5) == sources
    weak = {"autoguidance": str(workdir), "autoguidance_step": 6}
    guided = averaged_from(config, workdir, ConfigDict({**config.sample.to_dict(), **weak}), 5)
    assert guided == {**sources, "autoguidance_averages": {"sigma_rel": [0.05, 0.1], "steps": [3, 6]}}
    settings = ConfigDict({**config.sample.to_dict(), "weights": "sigma_rel:0.1"})
    assert averaged_from(config, workdir, settings, 5) == {}


def test_without_snapshots_only_what_was_tracked(tmp_path, whole):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir, ignore=shutil.ignore_patterns("snapshots"))
    jax.tree.map(np.testing.assert_array_equal, load(workdir, "sigma_rel:0.10"), load(whole[0], "sigma_rel:0.1"))
    line = "config.sample.weights = 'sigma_rel:0.07': must be one of sigma_rel:0.05, sigma_rel:0.1, which are tracked"
    with pytest.raises(ConfigError, match=line):
        load(workdir, "sigma_rel:0.07")
    with pytest.raises(ConfigError, match=f"'ema:0.7': must be one of ema, raw, ema:0.5, .* in {workdir}$"):
        load(workdir, "ema:0.7")


def test_snapshots_of_other_names_are_passed_over_and_damaged_ones_named(tmp_path, whole):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    before, snapshots = load(workdir, "sigma_rel:0.07"), Snapshots(workdir)
    shutil.copy(snapshots.path(3), snapshots.folder / "0000003 (copy).npz")
    jax.tree.map(np.testing.assert_array_equal, load(workdir, "sigma_rel:0.07"), before)
    snapshots.path(3).write_bytes(snapshots.path(3).read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"snapshots/0000003.npz: cannot be read .*; without it the others are used"):
        load(workdir, "sigma_rel:0.07")
