"""Samplers against the exact denoiser of a Gaussian: order of convergence, statistics, and what tells them apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import diffusion as df
from jaxdiff.errors import ConfigError

MEAN, STD = 0.3, 0.5
SCHEDULE = df.make_schedule("linear", beta_start=1e-4, beta_end=0.02)
EDM = df.Edm(0.1, 4.0, 3.0)
FLOW = df.Flow()
SPACING = {"Edm": "karras", "Flow": "even", "Schedule": "trailing"}


def exact_model(process, prediction="x0", sigma_data=0.5):
    """(c_in x, t) -> the prediction whose image is E[x_0 | x] where x_0 ~ N(MEAN, STD^2)."""
    kind = df.PREDICTIONS[prediction]

    def model(scaled, t):
        a, s = process.levels(t, scaled.ndim)
        x = scaled / kind.input_scale(a, s, sigma_data)
        x0 = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)
        return df.to_target(kind.target(a, s, sigma_data), x0, (x - a * x0) / s)

    return model


def run(process, sampler, steps, prediction="x0", count=8, dim=1, **options):
    """All x of a sampler's trajectory, from the same noise, and its plan."""
    keys = df.sample_keys(jax.random.key(0), jnp.arange(count))
    x_init = df.initial_noise(keys, (dim,))
    spacing = SPACING[type(process).__name__]
    plan = df.make_plan(process, sampler, steps=steps, spacing=spacing, prediction=prediction, **options)
    model, rows = exact_model(process, prediction), int(plan.num_steps)
    x, _ = jax.jit(lambda plan, x: df.trajectory(model, plan, x, keys, num_steps=rows, clip=False))(plan, x_init)
    return np.asarray(x), plan, np.asarray(x_init) * float(plan.initial_scale)


def solution(x, a, s, a_next, s_next):
    """Where the probability flow takes x: along the quantiles of the marginals N(a MEAN, (a STD)^2 + s^2)."""
    return a_next * MEAN + (x - a * MEAN) * np.hypot(a_next * STD, s_next) / np.hypot(a * STD, s)


@pytest.mark.parametrize("process", [EDM, FLOW], ids=["edm", "flow"])
@pytest.mark.parametrize(
    ("sampler", "order"), [("euler", 1), ("dpmpp_1", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2)]
)
def test_order_of_convergence(process, sampler, order):
    errors = []
    for steps in (20, 40):
        x, plan, start = run(process, sampler, steps)
        rows = plan.rows
        # Until the last level before the clean end: the step from there is Euler's in all of them. In the flow, which
        # gets ever steeper in log SNR, until the same level for both numbers of steps.
        per_step = 2 if sampler == "heun" else 1
        end = steps - 1 if process is EDM else steps * 4 // 5
        at = end * per_step
        levels = (float(t[i]) for i in (0, at) for t in (rows.signal, rows.sigma))
        errors.append(np.abs(x[at - 1] - solution(start, *levels)).max())
    assert order - 0.35 < np.log2(errors[0] / errors[1]) < order + (1.3 if sampler == "unipc" else 0.8), errors
    assert errors[1] < (0.05 if order == 1 else 0.004)


@pytest.mark.parametrize("prediction", ["x0", "v", "flow", "edm"])
@pytest.mark.parametrize("process", [EDM, FLOW, SCHEDULE], ids=["edm", "flow", "linear"])
def test_samples_do_not_depend_on_what_is_predicted(process, prediction):
    x, _, _ = run(process, "dpmpp_2m", 12, prediction)
    np.testing.assert_allclose(x[-1], run(process, "dpmpp_2m", 12, "x0")[0][-1], atol=2e-5)


@pytest.mark.parametrize(
    ("process", "sampler", "steps", "options"),
    [
        (FLOW, "ddpm", 400, {}),
        (df.Edm(0.01, 20.0), "ddpm", 400, {}),
        (df.Edm(0.01, 20.0), "ddim", 400, {"eta": 1.0}),
        (df.Edm(0.01, 20.0), "heun", 60, {"churn": df.Churn(30.0)}),
        (df.Edm(0.01, 20.0), "euler", 500, {"churn": df.Churn(20.0, 0.05, 10.0, 1.0)}),
        (SCHEDULE, "unipc", 40, {}),
    ],
)
def test_noise_is_replaced_by_as_much(process, sampler, steps, options):
    x, plan, _ = run(process, sampler, steps, count=64, dim=256, **options)
    assert abs(x[-1].mean() - MEAN) < 0.01 and abs(x[-1].std() / STD - 1) < 0.025
    assert (np.asarray(plan.rows.rule.noise[: plan.num_steps - 1]) > 0).any() == (sampler != "unipc")


def test_churn_stays_in_its_interval_and_below_its_bound():
    churn = df.Churn(1000.0, 0.5, 3.0, 1.1)
    plan = df.make_plan(EDM, "euler", steps=10, spacing="karras", churn=churn)
    plain = df.make_plan(EDM, "euler", steps=10, spacing="karras")
    levels, sigma = np.asarray(plan.rows.sigma[:10]), np.asarray(plain.rows.sigma[:10])
    inside = (sigma >= 0.5) & (sigma <= 3)
    assert 0 < inside.sum() < 10
    np.testing.assert_allclose(levels, np.where(inside, sigma * np.sqrt(2), sigma), rtol=1e-5)
    np.testing.assert_allclose(plan.rows.rule.noise[:9], np.where(inside, 1.1 * sigma, 0)[1:], rtol=1e-5)


def test_churn_of_the_first_step_is_in_the_noise_that_is_begun_with():
    """Algorithm 2 of EDM begins with x of deviation sigma_max, and adds S_noise^2 (raised^2 - sigma_max^2)."""
    raised = EDM.pairs("karras", 10)[0][0, 2] * (1 + min(40 / 10, np.sqrt(2) - 1))
    for spread in (1.0, 1.1):
        plan = df.make_plan(EDM, "heun", steps=10, spacing="karras", churn=df.Churn(40.0, 0.0, np.inf, spread))
        added = spread**2 * (raised**2 - EDM.pairs("karras", 10)[0][0, 2] ** 2)
        expected = np.sqrt(EDM.pairs("karras", 10)[0][0, 2] ** 2 + added)
        np.testing.assert_allclose(plan.initial_scale, expected, rtol=1e-6)
        np.testing.assert_allclose(plan.rows.sigma[0], raised, rtol=1e-6)


def test_one_end_of_the_learned_range_is_the_larger_variance_and_one_the_smaller():
    keys = df.sample_keys(jax.random.key(0), jnp.arange(3))
    x_init = df.initial_noise(keys, (4,))
    exact = exact_model(SCHEDULE, "eps")

    def draw(sampler, v):
        plan = df.make_plan(SCHEDULE, sampler, steps=10, spacing="trailing")

        def model(x, t):
            return exact(x, t) if v is None else df.Output(exact(x, t), jnp.full_like(x, v))

        return df.sample(model, plan, x_init, keys, clip=False)

    for v, fixed in ((1.0, "ddpm_large"), (-1.0, "ddpm")):
        np.testing.assert_allclose(draw("ddpm", v), draw(fixed, None), atol=1e-5)
    np.testing.assert_allclose(draw("ddim", 0.3), draw("ddim", None), atol=1e-6)
    assert np.abs(draw("ddpm", 0.3) - draw("ddpm", -1.0)).max() > 1e-3


def test_published_noise_levels_of_edm():
    rows, _ = df.Edm().pairs("karras", 18)
    np.testing.assert_allclose(rows[[0, 1, 2, -1], 0], [80, 57.585985, 40.785574, 0.002], rtol=1e-6)


def test_shift_of_the_noise():
    shifted = df.make_schedule("cosine", noise_shift=2.0)
    a, s = np.sqrt(shifted.alphas_cumprod), np.sqrt(1 - shifted.alphas_cumprod)
    plain = df.make_schedule("cosine").alphas_cumprod
    np.testing.assert_allclose(s / a, 2 * np.sqrt(1 / plain - 1), rtol=1e-6)
    t = jnp.array([0.1, 0.5, 0.9])
    a, s = df.Flow(2.0).levels(t)
    np.testing.assert_allclose(s / a, 2 * t / (1 - t), rtol=1e-5)
    np.testing.assert_allclose(df.Flow(2.0).network_time(t), 1000 * s, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: df.make_plan(SCHEDULE, "dpmpp_2m", spacing="linspace"), "sample.spacing = 'linspace'.*'dpmpp_2m'"),
        (lambda: df.make_plan(EDM), "sample.spacing = 'leading'.*karras"),
        (lambda: df.make_plan(FLOW, spacing="karras"), "sample.spacing = 'karras'.*even"),
        (lambda: df.make_plan(EDM, steps=0, spacing="karras"), "sample.steps = 0.*at least 1"),
        (lambda: df.make_plan(FLOW, spacing="even"), "diffusion.prediction = 'eps'"),
        (lambda: df.make_plan(SCHEDULE, churn=df.Churn(1.0)), "sample.churn"),
        (lambda: df.make_plan(EDM, "unipc", spacing="karras", churn=df.Churn(1.0)), "sample.churn.*'euler' or 'heun'"),
        (
            lambda: df.make_plan(df.make_schedule(zero_terminal_snr=True), spacing="trailing"),
            "diffusion.prediction = 'eps'.*zero_terminal_snr",
        ),
    ],
)
def test_errors_name_field_value_and_what_is_allowed(call, words):
    with pytest.raises(ConfigError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_an_output_that_is_not_split_is_an_error():
    keys = df.sample_keys(jax.random.key(0), jnp.arange(2))
    plan = df.make_plan(SCHEDULE, "dpmpp_2m", spacing="dpm")
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 6\) must have the shape of x \(2, 4, 4, 3\)"):
        df.sample(lambda x, t: jnp.concatenate([x, x], -1), plan, jnp.zeros((2, 4, 4, 3)), keys, clip=False)
