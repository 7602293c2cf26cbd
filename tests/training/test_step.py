"""The training step: what it computes, in parts, over devices, and compared with recorded numbers."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import mesh as meshes
from jaxdiff.build import build_network
from jaxdiff.diffusion import make_schedule
from jaxdiff.keys import named_key
from jaxdiff.training.objectives import Recipe, diffusion_objective
from jaxdiff.training.optimizer import clip_by_global_norm, global_norm, lr_schedule, make_optimizer
from jaxdiff.training.step import Objective, make_eval_step, make_init, make_train_step

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "train_step.json"
SEED, BATCH = 7, 16


def mesh_of(count):
    return jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])


def prepare(batch, key, memory=()):
    return {"x": batch["x"], "target": batch["x"].sum(-1) + jax.random.normal(key, batch["x"].shape[:1])}


def loss(params, inputs, key, frozen):
    error = jnp.square(inputs["x"] @ params["w"] - inputs["target"])
    return error, {"target": inputs["target"]}


def toy_run(devices=1, accumulate=1, steps=3, lr=0.1, clip_norm=1.0, ema_decay=0.9):
    """Some steps of a linear regression: states, metrics, and the gradient transformation."""
    mesh = mesh_of(devices)
    schedule = lr_schedule(lr, 10, 2)
    optimizer = make_optimizer(schedule, 0.01, clip_norm)
    state = make_init(lambda key: {"w": jax.random.normal(key, (3,))}, optimizer, mesh)(named_key(SEED, "init"))
    objective = Objective(prepare, loss)
    step = make_train_step(objective, optimizer, schedule, mesh, seed=SEED, ema_decay=ema_decay, accumulate=accumulate)
    states, metrics = [jax.tree.map(np.asarray, state)], []
    for k in range(steps):
        batch = {"x": np.random.default_rng(k).standard_normal((BATCH, 3)).astype(np.float32)}
        state, one = step(state, meshes.put_batch(batch, mesh), ())
        states.append(jax.tree.map(np.asarray, state))
        metrics.append({name: float(value) for name, value in one.items()})
    return states, metrics


@pytest.fixture(scope="module")
def reference():
    return toy_run()


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_updates_are_adamw_on_the_clipped_gradient(reference):
    states, metrics = reference
    batch = {"x": np.random.default_rng(0).standard_normal((BATCH, 3)).astype(np.float32)}
    inputs = prepare(batch, jax.random.fold_in(named_key(SEED, "train"), 0))
    w = states[0].params["w"]
    gradient = 2 * batch["x"].T @ (batch["x"] @ w - inputs["target"]) / BATCH
    norm = np.linalg.norm(gradient)
    assert norm > 1 and metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    adam = states[1].opt_state[1][0]
    np.testing.assert_allclose(adam.mu["w"], 0.1 * gradient / norm, rtol=1e-4)
    # The learning rate's warm-up begins at 0; the second step is half the peak of 0.1, and bias-corrected.
    assert metrics[0]["lr"] == 0 and (states[1].params["w"] == w).all()
    assert metrics[1]["lr"] == pytest.approx(0.05)
    adam = states[2].opt_state[1][0]
    direction = (adam.mu["w"] / (1 - 0.9**2)) / (np.sqrt(adam.nu["w"] / (1 - 0.999**2)) + 1e-8)
    np.testing.assert_allclose(states[2].params["w"], w - 0.05 * (direction + 0.01 * w), rtol=1e-4)


def test_average_warms_up(reference):
    states, _ = reference
    assert (states[0].ema["w"] == states[0].params["w"]).all()
    ema = states[0].ema["w"]
    for n, state in enumerate(states[1:]):
        decay = min(0.9, (1 + n) / (10 + n))
        ema = decay * ema + (1 - decay) * state.params["w"]
        np.testing.assert_allclose(state.ema["w"], ema, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"accumulate": 4}, {"devices": 8}, {"devices": 4, "accumulate": 2}])
def test_parts_and_devices_do_not_matter(reference, settings):
    states, metrics = toy_run(**settings)
    assert_trees_close(states[-1], reference[0][-1], rtol=1e-5, atol=1e-6)
    assert_trees_close(metrics[-1], reference[1][-1], rtol=1e-5)


def test_state_counts_its_steps_and_is_donated():
    mesh = mesh_of(2)
    optimizer = optax.sgd(0.1)
    state = make_init(lambda key: {"w": jnp.ones(3)}, optimizer, mesh)(named_key(0, "init"))
    step = make_train_step(Objective(prepare, loss), optimizer, lambda n: 0.1, mesh, seed=0, ema_decay=0.5)
    new, _ = step(state, meshes.put_batch({"x": np.ones((4, 3), np.float32)}, mesh), ())
    assert int(new.step) == 1 and state.params["w"].is_deleted()
    assert new.params["w"].sharding.is_fully_replicated


def test_draws_differ_from_step_to_step(reference):
    _, metrics = toy_run(lr=1e-9)
    again = toy_run(lr=1e-9)[1]
    assert metrics == again
    assert len({m["target"] for m in metrics}) == 3


def test_evaluation_leaves_out_rows_of_weight_zero_and_repeats_its_draws():
    mesh = mesh_of(2)
    step = make_eval_step(Objective(prepare, loss), mesh, seed=0)
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    params = {"w": jnp.ones(3)}

    def run(weight, index, x=x):
        batch = meshes.put_batch({"x": x, "weight": np.array(weight, np.float32)}, mesh)
        return {k: float(v) for k, v in step(params, batch, jnp.int32(index), ()).items()}

    full, part = run([1, 1, 1, 1], 0), run([1, 1, 1, 0], 0)
    changed = run([1, 1, 1, 0], 0, np.concatenate([x[:3], x[3:] + 100]))
    assert full == run([1, 1, 1, 1], 0) and full["loss"] != run([1, 1, 1, 1], 1)["loss"]
    assert part["weight"] == 3 and part["loss"] < full["loss"]
    assert part["loss"] == pytest.approx(changed["loss"])


def unet_run(tiny, devices, start=None):
    """Three steps of the tiny UNet on noise images: parameters at the start, metrics, parameters, average."""
    config = tiny("ddpm")
    unet, mesh = build_network(config, 3, 10), mesh_of(devices)
    schedule = lr_schedule(1e-3, 10)
    optimizer = make_optimizer(schedule, 1e-4, 1.0)
    one = jnp.zeros((1,), jnp.int32)
    init = (lambda key: start) if start else (lambda key: unet.init(key, jnp.zeros((1, 8, 8, 3)), one, one))
    state = make_init(init, optimizer, mesh)(named_key(SEED, "init"))
    start = jax.tree.map(np.asarray, state.params)
    objective = diffusion_objective(unet, make_schedule("linear"), Recipe(label_dropout=0.1), null_label=10)
    step = make_train_step(objective, optimizer, schedule, mesh, seed=SEED, ema_decay=0.99)
    metrics = []
    for k in range(3):
        rng = np.random.default_rng(k)
        image, label = rng.integers(0, 256, (BATCH, 8, 8, 3), np.uint8), rng.integers(0, 10, BATCH, np.int32)
        state, one_step = step(state, meshes.put_batch({"image": image, "label": label}, mesh), ())
        metrics.append({name: float(value) for name, value in one_step.items()})
    return start, metrics, jax.tree.map(np.asarray, state.params), jax.tree.map(np.asarray, state.ema)


@pytest.fixture(scope="module")
def eight(tiny):
    return unet_run(tiny, 8)


def test_eight_devices_train_as_one_does(tiny, eight):
    _, metrics, params, ema = unet_run(tiny, 1, start=eight[0])
    assert_trees_close(metrics, eight[1], rtol=1e-4)
    # Adam divides by gradients of any size, so that rounding shows as fractions of the learning rate.
    assert_trees_close((params, ema), eight[2:], atol=2e-4)


def test_golden_step(eight):
    """Three steps of the whole training step, as recorded on eight devices by

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.training.test_step
    """
    golden = json.loads(GOLDEN.read_text())
    now = summary(*eight)
    for name, value in golden.items():
        assert now[name] == pytest.approx(value, rel=1e-3), (
            f"{name} is {now[name]}, recorded was {value}: training computes something else than before. If that is "
            "meant (another initialisation, loss or optimiser), record it anew and say why in the commit"
        )


def summary(start, metrics, params, ema):
    norms = {name: float(optax.tree.norm(tree)) for name, tree in (("params", params), ("ema", ema))}
    return {f"{name} {k}": m[name] for k, m in enumerate(metrics) for name in ("loss", "grad_norm")} | norms


@pytest.mark.parametrize("largest", [0.5, 100.0])
def test_clipping_is_that_of_optax(largest):
    shapes = {"kernel": (3, 4), "bias": (5,), "scale": (2,), "temperature": ()}
    tree = {name: 2.0 + jax.random.normal(jax.random.key(k), shape) for k, (name, shape) in enumerate(shapes.items())}
    ours, theirs = (
        clip(largest).update(tree, optax.EmptyState())[0] for clip in (clip_by_global_norm, optax.clip_by_global_norm)
    )
    assert_trees_close(ours, theirs, rtol=1e-6)
    np.testing.assert_allclose(global_norm(tree), optax.tree.norm(tree), rtol=1e-6)


if __name__ == "__main__":
    from tests.tiny import tiny_config

    GOLDEN.write_text(json.dumps(summary(*unet_run(tiny_config, 8)), indent=2) + "\n")
