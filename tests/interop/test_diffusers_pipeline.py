"""Noise schedules of pipelines, and what of a latent space their autoencoders take up."""

import json

import jax
import numpy as np
import pytest

from configs import ddpm
from jaxdiff import diffusion
from jaxdiff.build import build_process
from jaxdiff.data.latents import Whitening
from jaxdiff.errors import ConfigError
from jaxdiff.interop.diffusers import autoencoder_names
from jaxdiff.interop.pipeline import fold_whitening, schedule_fields, scheduler_config
from jaxdiff.interop.tensors import import_params
from jaxdiff.models import AutoencoderKL
from tests.interop.golden import SCHEDULER_PATH, SCHEDULER_STEPS, exported_schedulers, weights
from tests.interop.shapes import shapes_of


@pytest.mark.parametrize(("sampler", "spacing", "written"), exported_schedulers())
def test_schedulers_take_the_steps_that_ours_take(sampler, spacing, written):
    """diffusers' steps, recorded for the scheduler_config.json that is written."""
    golden, name = np.load(SCHEDULER_PATH), f"{sampler}/{spacing}"
    assert written == json.loads(str(golden[f"{name}/config"]))
    process = build_process(ddpm.get_config("digits"))
    plan = diffusion.make_plan(process, sampler, steps=SCHEDULER_STEPS, spacing=spacing)
    assert plan.rows.time[:SCHEDULER_STEPS].tolist() == golden[f"{name}/timesteps"].tolist()
    state = diffusion.begin(golden["x"])
    step = jax.jit(lambda row: diffusion.denoise_step(row, state, golden["eps"], golden["z"], clip=True)[0].x)
    steps = [step(diffusion.plan_row(plan, np.int32(i), 4)) for i in range(SCHEDULER_STEPS)]
    np.testing.assert_allclose(steps, golden[f"{name}/steps"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "prediction", "zero"),
    [("linear", "eps", False), ("scaled_linear", "v", True), ("cosine", "x0", False)],
)
def test_noise_schedules_come_back(tmp_path, schedule, prediction, zero):
    config = ddpm.get_config("digits")
    config.diffusion.update(schedule=schedule, num_steps=500, prediction=prediction, zero_terminal_snr=zero)
    written = scheduler_config(config)
    assert (written["beta_start"], written["beta_end"]) == (4e-4, 0.04)  # diffusers does not scale by 1000 / T
    (tmp_path / "scheduler_config.json").write_text(json.dumps(written))
    names = ("schedule", "num_steps", "beta_start", "beta_end", "prediction", "zero_terminal_snr")
    assert schedule_fields(tmp_path) == {f"diffusion.{name}": config.diffusion[name] for name in names}
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**written, "prediction_type": "flow_prediction"}))
    with pytest.raises(ConfigError, match="prediction_type = 'flow_prediction'"):
        schedule_fields(tmp_path)


def test_whitening_goes_into_the_convolutions():
    model = AutoencoderKL(2, 8, (1, 2), 1)
    image = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    noise = np.zeros((2, 4, 4, 2), np.float32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), image, noise)
    names = autoencoder_names(2)
    tensors, whitening = weights(shapes_of(abstract, names)), Whitening([0.5, -2.0], [0.25, 3.0])
    plain, folded = (import_params(t, abstract, names, "here") for t in (tensors, fold_whitening(tensors, whitening)))
    encode = jax.jit(lambda params: model.apply(params, image, method="encode"))
    decode = jax.jit(lambda params, z: model.apply(params, z, method="decode"))
    before, after = encode(plain), encode(folded)
    np.testing.assert_allclose(after.mean, whitening.whiten(before.mean), atol=1e-5)
    np.testing.assert_allclose(after.logvar, before.logvar - 2 * np.log([[[[0.25, 3.0]]]]), atol=1e-5)
    np.testing.assert_allclose(decode(folded, after.mean), decode(plain, before.mean), atol=1e-4)
