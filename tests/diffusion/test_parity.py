"""The maths against arrays computed by guided-diffusion and diffusers (tests/golden)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import diffusion as df

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
ADM = np.load(GOLDEN / "guided_diffusion.npz")
DIFFUSERS = np.load(GOLDEN / "diffusers_ddim.npz")
X0, NOISE, EPS, T, INDEX = (ADM[f"in/{k}"] for k in ("x0", "noise", "model_eps", "t", "ddim_index"))
SCHEDULES = {name: df.make_schedule(name, beta_start=1e-4, beta_end=0.02) for name in df.SCHEDULES}
RULES = {"FIXED_SMALL": "ddpm", "FIXED_LARGE": "ddpm_large"}


def same(actual, expected, tolerance=1e-5):
    """Equal within `tolerance` of the largest value of each sample."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    actual = np.broadcast_to(actual, expected.shape)
    axes = tuple(range(1, expected.ndim))
    scale = np.abs(expected).max(axis=axes, keepdims=True)
    assert (np.abs(actual - expected) <= tolerance * scale + 1e-12).all(), np.abs(actual - expected).max()


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE"])
class TestGuidedDiffusion:
    def test_forward_process_and_posterior(self, name, variance):
        schedule, golden = SCHEDULES[name], f"{name}/{variance}"
        x_t = df.q_sample(schedule, X0, T, NOISE)
        same(x_t, ADM[f"{golden}/x_t"])
        posterior = df.q_posterior(schedule, X0, ADM[f"{golden}/x_t"], T)
        same(posterior.mean, ADM[f"{golden}/q_posterior_mean"])
        same(posterior.variance, ADM[f"{golden}/q_posterior_var"])
        same(posterior.log_variance, ADM[f"{golden}/q_posterior_log_var_clipped"])

    @pytest.mark.parametrize("clip", [True, False])
    def test_reverse_process(self, name, variance, clip):
        x_t = ADM[f"{name}/{variance}/x_t"]
        p = df.p_mean_variance(SCHEDULES[name], EPS, x_t, T, variance=variance.lower(), clip=clip)
        golden = f"{name}/{variance}/p_mean_variance/clip={clip}"
        same(p.mean, ADM[f"{golden}/mean"])
        same(p.variance, ADM[f"{golden}/variance"])
        same(p.log_variance, ADM[f"{golden}/log_variance"])
        same(p.pred_x0, ADM[f"{golden}/pred_xstart"])

    def test_ancestral_step(self, name, variance):
        schedule = SCHEDULES[name]
        plan = df.make_plan(schedule, RULES[variance], steps=1000)
        row = df.plan_row(plan, jnp.asarray(999 - T), ndim=4)
        x_t = ADM[f"{name}/{variance}/x_t"]
        same(df.denoise_step(row, x_t, EPS, NOISE, clip=False)[0], ADM[f"{name}/{variance}/ddpm_step"])

    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("clip", [True, False])
    def test_ddim_step_of_a_respaced_chain(self, name, variance, eta, clip):
        plan = df.make_plan(SCHEDULES[name], "ddim", steps=50, spacing="adm", eta=eta)
        row = df.plan_row(plan, jnp.asarray(49 - INDEX), ndim=4)
        x, _ = df.denoise_step(row, X0, EPS, NOISE, clip=clip)
        same(x, ADM[f"{name}/{variance}/ddim50/eta={eta}/clip={clip}"])


@pytest.mark.parametrize("counts", ["10", "50", "250", "10,10,10", "ddim25", "ddim50", "ddim250"])
def test_guided_diffusion_respacing(counts):
    t = df.sections(1000, counts)
    np.testing.assert_array_equal(t, ADM[f"respace/{counts}"])
    abar = SCHEDULES["linear"].alphas_cumprod[t]
    betas = 1 - abar / np.append(1.0, abar[:-1])
    np.testing.assert_allclose(betas, ADM[f"respace_betas/linear/{counts}"], rtol=1e-12)


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2", "scaled_linear"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_diffusers_ddim_trajectory(name, spacing):
    golden = f"ddim/{name}/{spacing}/epsilon/20"
    a, b, c = (float(value) for value in DIFFUSERS["in/abc"])
    schedule = SCHEDULES["cosine" if name == "squaredcos_cap_v2" else name]
    plan = df.make_plan(schedule, "ddim", steps=20, spacing=spacing)
    np.testing.assert_array_equal(plan.timesteps[:20], DIFFUSERS[f"{golden}/timesteps"])

    def model(x, t):
        return jnp.tanh(a * x + b * t[:, None, None, None] / 1000 + c)

    x_init = jnp.asarray(DIFFUSERS["in/x_T"])
    keys = df.sample_keys(jax.random.key(0), jnp.arange(len(x_init)))
    # diffusers clips the prediction of x_0 and keeps the predicted noise.
    x, _ = df.trajectory(model, plan, x_init, keys, num_steps=20, clip=True, recompute_eps=False)
    same(x, DIFFUSERS[f"{golden}/trajectory"])


def test_published_values_at_1000_steps():
    linear, cosine = SCHEDULES["linear"], SCHEDULES["cosine"]
    found = [linear.betas[500], linear.alphas_cumprod[500], linear.alphas_cumprod[-1], linear.posterior_variance[1]]
    np.testing.assert_allclose(found, [0.01005995996, 0.07779665837, 4.035829765e-5, 5.4531877e-5], rtol=1e-8)
    found = [cosine.betas[0], cosine.betas[500], cosine.alphas_cumprod[500], cosine.alphas_cumprod[-1]]
    np.testing.assert_allclose(found, [4.128422482e-5, 0.003155691442, 0.4922851724, 2.428766907e-9], rtol=1e-8)
    assert np.flatnonzero(cosine.betas == 0.999).tolist() == [999]
    stable = df.make_schedule("scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    np.testing.assert_allclose(stable[[500, -1]], [0.2763326838, 0.004660098513], rtol=1e-8)
