"""The maths against arrays computed by guided-diffusion and diffusers (tests/golden)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import diffusion as df

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
ADM = np.load(GOLDEN / "guided_diffusion.npz")
DIFFUSERS = np.load(GOLDEN / "diffusers_samplers.npz")
X0, NOISE, EPS, V, T, INDEX = (ADM[f"in/{k}"] for k in ("x0", "noise", "model_eps", "model_v", "t", "ddim_index"))
SCHEDULES = {name: df.make_schedule(name, beta_start=1e-4, beta_end=0.02) for name in df.SCHEDULES}
RULES = {"FIXED_SMALL": "ddpm", "FIXED_LARGE": "ddpm_large", "LEARNED_RANGE": "ddpm"}
DIFFUSERS_SCHEDULES = ["linear", "squaredcos_cap_v2", "scaled_linear"]


def predicted_x0(schedule, x, t, eps):
    a, s = schedule.levels(t, x.ndim)
    return df.to_x0(df.PREDICTIONS["eps"].target(a, s, 1.0), a, s, x, eps)


def output_of(variance):
    """What a network says: eps, and where it learns the variance v beside it."""
    return df.Output(EPS, V) if variance == "LEARNED_RANGE" else EPS


def bin_mass(x, mean, log_variance):
    """What guided-diffusion computes of the bin of x, in the precision of its arguments."""

    def cdf(z):
        return 0.5 * (1 + np.tanh(x.dtype.type(np.sqrt(2 / np.pi)) * (z + x.dtype.type(0.044715) * z**3)))

    scale = np.exp(-0.5 * log_variance)
    above, below = cdf(scale * (x - mean + x.dtype.type(1 / 255))), cdf(scale * (x - mean - x.dtype.type(1 / 255)))
    return np.where(x < -0.999, above, np.where(x > 0.999, 1 - below, above - below))


def fraction_of(variance):
    return df.learned_fraction(V) if variance == "LEARNED_RANGE" else None


def same(actual, expected, tolerance=1e-5):
    """Equal within `tolerance` of the largest value of each sample."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    actual = np.broadcast_to(actual, expected.shape)
    axes = tuple(range(1, expected.ndim))
    scale = np.abs(expected).max(axis=axes, keepdims=True)
    assert (np.abs(actual - expected) <= tolerance * scale + 1e-12).all(), np.abs(actual - expected).max()


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"])
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
        x_t, schedule = ADM[f"{name}/{variance}/x_t"], SCHEDULES[name]
        pred_x0 = predicted_x0(schedule, x_t, T, EPS)
        options = {"variance": variance.lower(), "fraction": fraction_of(variance), "clip": clip}
        p = df.p_mean_variance(schedule, pred_x0, x_t, T, **options)
        golden = f"{name}/{variance}/p_mean_variance/clip={clip}"
        same(p.mean, ADM[f"{golden}/mean"])
        same(p.variance, ADM[f"{golden}/variance"])
        same(p.log_variance, ADM[f"{golden}/log_variance"])
        same(p.pred_x0, ADM[f"{golden}/pred_xstart"])

    def test_ancestral_step(self, name, variance):
        plan = df.make_plan(SCHEDULES[name], RULES[variance], steps=1000)
        row = df.plan_row(plan, jnp.asarray(999 - T), ndim=4)
        state = df.begin(jnp.asarray(ADM[f"{name}/{variance}/x_t"]))
        state, _ = df.denoise_step(row, state, output_of(variance), NOISE, clip=False)
        same(state.x, ADM[f"{name}/{variance}/ddpm_step"])

    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("clip", [True, False])
    def test_ddim_step_of_a_respaced_chain(self, name, variance, eta, clip):
        plan = df.make_plan(SCHEDULES[name], "ddim", steps=50, spacing="adm", eta=eta)
        row = df.plan_row(plan, jnp.asarray(49 - INDEX), ndim=4)
        state, _ = df.denoise_step(row, df.begin(jnp.asarray(X0)), output_of(variance), NOISE, clip=clip)
        same(state.x, ADM[f"{name}/{variance}/ddim50/eta={eta}/clip={clip}"])

    def test_bound_in_bits_per_dimension(self, name, variance):
        schedule, golden = SCHEDULES[name], f"{name}/{variance}"
        x_t = ADM[f"{golden}/x_t"]
        pred_x0 = predicted_x0(schedule, x_t, T, EPS)
        options = {"discrete": True, "variance": variance.lower()}
        bits = df.vlb_term(schedule, X0, x_t, T, pred_x0, fraction_of(variance), **options)
        np.testing.assert_allclose(bits[1:], ADM[f"{golden}/vb_bits_per_dim"][1:], rtol=1e-4)
        # At t = 0 the reference takes differences of float32 numbers near 1; what is lost there becomes 1e-12. So it
        # is as there in float32, and ours is as the same formula in float64.
        p = df.p_mean_variance(schedule, pred_x0, x_t, T, variance=variance.lower(), fraction=fraction_of(variance))
        mean, log_variance = (np.broadcast_to(np.asarray(x)[0], X0[0].shape) for x in (p.mean, p.log_variance))
        single, double = (
            -np.log(np.maximum(bin_mass(X0[0].astype(d), mean.astype(d), log_variance.astype(d)), 1e-12)).mean()
            / np.log(2)
            for d in (np.float32, np.float64)
        )
        assert T[0] == 0 and single == pytest.approx(ADM[f"{golden}/vb_bits_per_dim"][0], rel=2e-3)
        assert bits[0] == pytest.approx(double, rel=1e-5)

    def test_bits_of_the_prior(self, name, variance):
        bits = df.prior_bits(SCHEDULES[name], X0)
        np.testing.assert_allclose(bits, ADM[f"{name}/{variance}/prior_bits_per_dim"], rtol=1e-3)


@pytest.mark.parametrize("counts", ["10", "50", "250", "10,10,10", "ddim25", "ddim50", "ddim250"])
def test_guided_diffusion_respacing(counts):
    t = df.sections(1000, counts)
    np.testing.assert_array_equal(t, ADM[f"respace/{counts}"])
    abar = SCHEDULES["linear"].alphas_cumprod[t]
    betas = 1 - abar / np.append(1.0, abar[:-1])
    np.testing.assert_allclose(betas, ADM[f"respace_betas/linear/{counts}"], rtol=1e-12)


def diffusers_trajectory(golden, prediction="eps", sampler="ddim", zero=False, **plan_options):
    """Golden trajectory and timesteps, and ours, of diffusers' toy network, which says what `prediction` says."""
    name = golden.split("/")[1]
    a, b, c = (float(value) for value in DIFFUSERS["in/abc"])
    schedule = df.make_schedule(
        "cosine" if name == "squaredcos_cap_v2" else name, beta_start=1e-4, beta_end=0.02, zero_terminal_snr=zero
    )
    plan = df.make_plan(schedule, sampler, steps=20, prediction=prediction, **plan_options)
    np.testing.assert_array_equal(plan.rows.time[:20], DIFFUSERS[f"{golden}/timesteps"])

    def model(x, t):
        return jnp.tanh(a * x + b * t[:, None, None, None] / 1000 + c)

    x_init = jnp.asarray(DIFFUSERS["in/x_T"])
    keys = df.sample_keys(jax.random.key(0), jnp.arange(len(x_init)))
    # diffusers clips the prediction of x_0 here, and keeps the predicted noise.
    clip = sampler == "ddim" and prediction == "eps"
    x, _ = df.trajectory(model, plan, x_init, keys, num_steps=20, clip=clip, recompute_eps=False)
    return x, DIFFUSERS[f"{golden}/trajectory"]


@pytest.mark.parametrize("name", DIFFUSERS_SCHEDULES)
@pytest.mark.parametrize(
    ("spacing", "theirs", "prediction"),
    [
        ("leading", "epsilon", "eps"),
        ("trailing", "epsilon", "eps"),
        ("linspace", "epsilon", "eps"),
        ("trailing", "v_prediction", "v"),
        ("trailing", "sample", "x0"),
    ],
)
def test_diffusers_ddim_trajectory(name, spacing, theirs, prediction):
    x, golden = diffusers_trajectory(f"ddim/{name}/{spacing}/{theirs}/20", prediction, spacing=spacing)
    same(x, golden, 1e-5 if prediction == "eps" else 1e-4)


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_diffusers_zero_terminal_snr(name):
    betas = {"beta_start": 1e-4, "beta_end": 0.02}
    schedule = df.make_schedule(name, **betas, zero_terminal_snr=True)
    abar = DIFFUSERS[f"alphas_cumprod/{name}/zero_terminal_snr"]
    np.testing.assert_allclose(schedule.alphas_cumprod, abar, rtol=1e-5, atol=1e-7)
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.alphas_cumprod[0] == pytest.approx(df.make_schedule(name, **betas).alphas_cumprod[0], rel=1e-12)
    golden = f"ddim/{name}/trailing/v_prediction/zero_terminal_snr/20"
    x, golden = diffusers_trajectory(golden, "v", spacing="trailing", zero=True)
    same(x, golden, 1e-4)


@pytest.mark.parametrize("name", DIFFUSERS_SCHEDULES)
@pytest.mark.parametrize(
    ("sampler", "theirs"),
    [
        ("dpmpp_1", "dpmsolver++/{}/order1/20"),
        ("dpmpp_2m", "dpmsolver++/{}/order2/20"),
        ("unipc", "unipc/{}/order2/20"),
    ],
)
def test_diffusers_solvers(name, sampler, theirs):
    x, golden = diffusers_trajectory(theirs.format(name), sampler=sampler, spacing="dpm")
    same(x, golden, 1e-4)


def test_published_values_at_1000_steps():
    linear, cosine = SCHEDULES["linear"], SCHEDULES["cosine"]
    found = [linear.betas[500], linear.alphas_cumprod[500], linear.alphas_cumprod[-1], linear.posterior_variance[1]]
    np.testing.assert_allclose(found, [0.01005995996, 0.07779665837, 4.035829765e-5, 5.4531877e-5], rtol=1e-8)
    found = [cosine.betas[0], cosine.betas[500], cosine.alphas_cumprod[500], cosine.alphas_cumprod[-1]]
    np.testing.assert_allclose(found, [4.128422482e-5, 0.003155691442, 0.4922851724, 2.428766907e-9], rtol=1e-8)
    assert np.flatnonzero(cosine.betas == 0.999).tolist() == [999]
    stable = df.make_schedule("scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    np.testing.assert_allclose(stable[[500, -1]], [0.2763326838, 0.004660098513], rtol=1e-8)
