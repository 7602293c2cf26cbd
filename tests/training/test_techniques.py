"""Techniques in whole runs: the bound by importance sampling, and samplers of continuous time."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from configs import ablations
from jaxdiff import mesh as meshes
from jaxdiff import startup
from jaxdiff.build import build_network
from jaxdiff.errors import Stopped
from jaxdiff.generator import Generator
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.stages import run_train
from jaxdiff.training.step import Memory, Objective, make_init, make_train_step


def test_memory_is_the_same_in_parts():
    """Samples are remembered in any order, but all of them, and those of one step are there in the next."""

    def prepare(batch, key, memory):
        return {"x": batch["x"], "seen": jnp.full(len(batch["x"]), memory.sum())}

    def loss(params, inputs, key, frozen):
        return inputs["x"] * params, {"seen": inputs["seen"], "twice": 2 * inputs["x"]}

    memory = Memory(jnp.zeros(8), lambda memory, inputs, metrics: memory.at[:].set(jnp.sort(metrics["twice"])))
    mesh, results = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), []
    for accumulate in (1, 2):
        objective, optimizer = Objective(prepare, loss, memory=memory), optax.sgd(0.1)
        step = make_train_step(objective, optimizer, lambda n: 0.1, mesh, seed=0, ema_decay=0.9, accumulate=accumulate)
        state = make_init(lambda key: jnp.ones(()), optimizer, mesh, memory=memory)(jax.random.key(0))
        batch = meshes.put_batch({"x": np.arange(8, dtype=np.float32)}, mesh)
        state, first = step(state, batch, ())
        np.testing.assert_array_equal(state.memory, 2 * np.arange(8))
        state, second = step(state, batch, ())
        assert first["seen"] == 0 and second["seen"] == 56
        results.append(float(state.params))
    assert results[0] == pytest.approx(results[1])


def test_the_bound_is_trained_and_evaluated(tiny, tmp_path):
    config = tiny("ddpm")
    config.update_from_flattened_dict(ablations.ABLATIONS["vlb"])
    config.model.update(channel_mult=(1,), attention_resolutions=())
    config.update(steps=4, batch_size=80)
    config.diffusion.update(num_steps=8, beta_start=1e-4, beta_end=5e-3, stratified=True)
    config.sample.spacing = "trailing"
    config.eval.scores = ()
    with pytest.raises(Stopped):
        run_train(config, tmp_path / "run", stop_at=2)
    run_train(config, tmp_path / "run")
    memory = ocp.StandardCheckpointer().restore(Checkpoints(tmp_path / "run").folder / "4" / "memory")
    assert memory["seen"].sum() == 4 * 80  # what was seen before it stopped, too
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 and np.isfinite(line["vlb"]) for line in lines if "vlb" in line) and "vlb" in lines[0]

    startup.evaluate(
        tmp_path / "run", None, {"eval.nll": True, "eval.nll_num": 5, "eval.scores": (), "sample.batch_size": 8}, None
    )
    (record,) = json.loads((tmp_path / "run" / "scores.json").read_text())["records"]
    bits, prior = record["scores"]["bits_per_dim"], record["scores"]["bits_per_dim_prior"]
    assert 0 < prior < bits < 30 and record["protocol"]["num"] == 5
    assert record["protocol"]["bound"] == "all 8 terms, learned variance, clip True"


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_samplers_of_continuous_time(tiny, name):
    config = tiny("ddpm")
    config.model.update(channel_mult=(1,), attention_resolutions=())
    fields = ablations.ABLATIONS[name]
    config.update_from_flattened_dict(fields(config) if callable(fields) else fields)
    network = build_network(config, 3, 4)
    one = jnp.zeros((1,), jnp.int32)
    params = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), one, one)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(tree, [jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype) for x in leaves])
    generator = Generator(config, (8, 8, 3), 4, meshes.make_mesh())
    settings = config.sample
    settings.update(steps=6, batch_size=8, guidance=1.5, guidance_interval=(0.3, 0.7))
    labels = np.arange(8) % 4
    images = generator(params, settings, labels)
    assert images.shape == (8, 8, 8, 3) and images.std() > 10
    changes = {"sampler": "dpmpp_2m"}, {"guidance_interval": (0.0, 0.1)}, {"steps": 7}
    changes += ({"sigmas": (0.01, 20.0, 5.0)}, {"churn": (3.0,)}) if name == "edm" else ()
    count = generator._run._cache_size()
    for change in changes:
        other = settings.copy_and_resolve_references()
        other.update(change)
        assert (generator(params, other, labels) != images).any(), change
    assert generator._run._cache_size() == count  # one program for all of them
    settings.update(guidance=0.0, guidance_interval=())
    frames = generator.denoising(params, settings, labels, frames=4)
    assert frames["x_t"].shape == (4, 8, 8, 8, 3) and (np.diff(frames["t"]) < 0).all()
