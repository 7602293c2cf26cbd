"""What the maths promises beyond single numbers: inverses, ends of tables, statistics, one program for all plans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdiff import diffusion as df
from jaxdiff.errors import ConfigError

SCHEDULE = df.make_schedule("linear", beta_start=2e-4, beta_end=0.02)
KEY = jax.random.key(0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def toy_model(x, t):
    return jnp.tanh(x + t[:, None, None, None] / 1000)


@pytest.mark.parametrize("name", df.SCHEDULES)
def test_tables(name):
    s = df.make_schedule(name, 200, beta_start=1e-4, beta_end=0.02)
    assert s.betas.dtype == s.alphas_cumprod.dtype == np.float64
    assert ((s.betas > 0) & (s.betas < 1)).all() and (np.diff(s.alphas_cumprod) < 0).all()
    assert s.alphas_cumprod_prev[0] == 1 and s.posterior_variance[0] == 0
    assert np.isfinite(s.posterior_log_variance_clipped).all()


def test_fewer_steps_reach_the_same_noise():
    last = [df.make_schedule("linear", n, beta_start=1e-4, beta_end=0.02).alphas_cumprod[-1] for n in (100, 1000)]
    assert 0.4 < last[0] / last[1] < 1


def test_extract_at_both_ends():
    table = SCHEDULE.betas
    np.testing.assert_array_equal(df.extract(table, jnp.array([0, 999]), 3), np.float32(table[[0, 999]])[:, None, None])


@pytest.mark.parametrize("name", df.PREDICTIONS)
def test_predictions_give_image_and_noise_back(name):
    x0, eps, t = normal(0, 4, 3, 3, 2), normal(1, 4, 3, 3, 2), jnp.array([0, 10, 500, 999])
    x_t = df.q_sample(SCHEDULE, x0, t, eps)
    a, s = SCHEDULE.levels(t, 4)
    target = df.PREDICTIONS[name].target(a, s, 0.5)
    predicted = df.to_target(target, x0, eps)
    np.testing.assert_allclose(df.to_x0(target, a, s, x_t, predicted), x0, atol=1e-4)
    np.testing.assert_allclose(df.to_eps(target, a, s, x_t, predicted), eps, atol=1e-4)


def test_squared_error_is_per_sample():
    loss = df.squared_error(
        jnp.ones((2, 4, 4, 1)) * jnp.array([1.0, 3.0])[:, None, None, None], jnp.zeros((2, 4, 4, 1))
    )
    np.testing.assert_allclose(loss, [1, 9])


def test_timesteps_are_uniform_and_in_range():
    t = np.asarray(df.sample_timesteps(KEY, 100_000, 10))
    counts = np.bincount(t, minlength=10)
    assert len(counts) == 10 and counts.min() > 9_500


def test_guidance_formula_per_sample():
    cond, uncond = normal(0, 3, 2, 2, 1), normal(1, 3, 2, 2, 1)
    w = jnp.array([0.0, 1.5, 3.0])
    out = df.guide(cond, uncond, w)
    np.testing.assert_array_equal(out[0], cond[0])
    np.testing.assert_allclose(out[2], 4 * cond[2] - 3 * uncond[2], rtol=1e-5)
    np.testing.assert_allclose(df.guide(cond, uncond, 1.5)[1], out[1], rtol=1e-6)


def test_guidance_is_one_forward_pass_of_twice_the_batch():
    calls = []

    def apply(x, t, y):
        calls.append((x.shape, y.tolist()))
        return x * y[:, None, None, None]

    model = df.classifier_free(apply, null_label=10)
    x = normal(0, 2, 2, 2, 1)
    out = model(x, jnp.array([5, 5]), jnp.array([3, 4]), jnp.array([1.0, 2.0]))
    assert calls == [((4, 2, 2, 1), [3, 4, 10, 10])]
    np.testing.assert_allclose(out, jnp.stack([(2 * 3 - 10) * x[0], (3 * 4 - 2 * 10) * x[1]]), rtol=1e-5)


def test_rescaled_guidance_has_the_spread_of_the_conditional_one():
    cond, guided = normal(0, 3, 4, 4, 2), 5 * normal(1, 3, 4, 4, 2) + 1
    out = df.rescale(guided, cond, 1.0)
    np.testing.assert_allclose(out.std(axis=(1, 2, 3)), cond.std(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(df.rescale(guided, cond, 0.7), 0.7 * out + 0.3 * guided, rtol=1e-5)
    np.testing.assert_array_equal(df.rescale(guided, cond, 0.0), guided)
    np.testing.assert_array_equal(df.rescale(0 * guided, cond, 0.7), 0 * guided)


def test_autoguidance_leads_away_from_the_weak_model():
    x, y = normal(0, 3, 2, 2, 1), jnp.array([3, 4, 5])
    t, w = jnp.array([5, 5, 5]), jnp.array([0.0, 1.5, 3.0])
    calls = []

    def network(name, factor):
        def apply(x, t, y):
            calls.append((name, x.shape, y.tolist()))
            return factor * jnp.sin(x + y[:, None, None, None])

        return apply

    main, weak = network("main", 1.0), network("weak", 0.7)
    out = df.autoguided(main, weak)(x, t, y, w)
    assert calls == [(name, (3, 2, 2, 1), [3, 4, 5]) for name in ("main", "weak")]  # of the true classes, once each
    good, bad = main(x, t, y), weak(x, t, y)
    np.testing.assert_allclose(out, bad + (1 + w[:, None, None, None]) * (good - bad), atol=1e-6)
    np.testing.assert_array_equal(df.autoguided(main, main)(x, t, y, 0 * w), good)
    rescaled = df.autoguided(main, weak, phi=1.0)(x, t, y, w)
    np.testing.assert_allclose(rescaled.std(axis=(1, 2, 3)), good.std(axis=(1, 2, 3)), rtol=1e-5)


def test_outside_its_interval_guidance_is_not_computed():
    batches = []

    def apply(x, t, y):
        jax.debug.callback(lambda _: batches.append(len(x)), x, ordered=True)
        return x * y[:, None, None, None]

    y, w = jnp.array([3, 4]), jnp.array([1.0, 2.0])
    cfg = df.classifier_free(apply, null_label=10)
    low, high = jnp.int32(5), jnp.int32(7)
    model = jax.jit(df.within((low, high), lambda x, t: cfg(x, t, y, w), lambda x, t: apply(x, t, y)))
    x = normal(0, 2, 2, 2, 1)
    for t in (4, 5, 7, 8):
        out = model(x, jnp.array([t, t]))
        expected = cfg(x, jnp.array([t, t]), y, w) if low <= t <= high else apply(x, None, y)
        np.testing.assert_allclose(out, expected, rtol=1e-6)
    jax.effects_barrier()
    assert batches == [n for n in (2, 4, 4, 2) for _ in range(2)]  # twice: the model, and what is expected of it


@pytest.mark.parametrize("spacing", df.SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 50, 300, 999, 1000])
def test_spacings_descend_to_the_clean_end(spacing, steps):
    if (spacing, steps) == ("dpm", 1000):
        with pytest.raises(
            ConfigError, match="sample.steps = 1000: must be less than 1000 with sample.spacing = 'dpm'"
        ):
            df.timestep_pairs(spacing, 1000, steps)
        return
    t, t_prev = df.timestep_pairs(spacing, 1000, steps)
    assert len(t) == len(t_prev) == steps
    assert (np.diff(t) < 0).all() and t.min() >= 0 and t.max() <= 999
    assert t_prev[-1] == -1 and (t_prev < t).all()
    if spacing != "leading":
        assert t[0] == 999


def test_changing_the_plan_or_the_weight_does_not_compile_again():
    traces = []

    @jax.jit
    def run(plan, x, keys, w):
        def model(x, t):
            traces.append(1)
            return toy_model(x, t) * (1 + w)

        return df.sample(model, plan, x, keys, clip=True)

    keys = df.sample_keys(KEY, jnp.arange(2))
    x = df.initial_noise(keys, (4, 4, 1))
    plans = [
        df.make_plan(SCHEDULE, "ddim", steps=50),
        df.make_plan(SCHEDULE, "ddim", steps=100, spacing="trailing", eta=0.5),
        df.make_plan(SCHEDULE, "ddpm", steps=1000),
    ]
    results = [run(plan, x, keys, w) for plan in plans for w in (0.0, 1.5, 3.0)]
    assert len(traces) == 1
    assert len({np.asarray(r).tobytes() for r in results}) == 9


def draw(count, steps=10, eta=1.0, place=lambda x: x):
    indices = place(jnp.arange(count))
    plan = df.make_plan(SCHEDULE, "ddim", steps=steps, eta=eta)

    @jax.jit
    def run(indices):
        keys = df.sample_keys(KEY, indices)
        return df.sample(toy_model, plan, df.initial_noise(keys, (4, 4, 1)), keys, clip=False)

    return np.asarray(run(indices))


@pytest.mark.parametrize(("sampler", "steps", "together"), [("ddpm", 20, 10), ("ddim", 20, 10), ("ddpm", 7, 1)])
def test_evaluations_together_are_those_one_by_one(sampler, steps, together):
    plan = df.make_plan(SCHEDULE, sampler, steps=steps)
    assert df.evaluations_together(plan) == together
    keys = df.sample_keys(KEY, jnp.arange(3))
    x = df.initial_noise(keys, (4, 4, 1))
    run = jax.jit(lambda k: df.sample(toy_model, plan, x, keys, clip=True, together=k), static_argnums=0)
    np.testing.assert_allclose(run(together), run(1), rtol=1e-5, atol=1e-6)


def test_evaluations_that_would_be_left_out_are_an_error():
    plan, keys = df.make_plan(SCHEDULE, steps=25), df.sample_keys(KEY, jnp.arange(1))
    with pytest.raises(ValueError, match="together = 10: must divide the plan's 25 evaluations"):
        df.sample(toy_model, plan, jnp.zeros((1, 4, 4, 1)), keys, clip=True, together=10)


def test_sample_k_does_not_depend_on_batch_size_or_devices():
    whole = draw(8)
    np.testing.assert_allclose(draw(3), whole[:3], rtol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = draw(8, place=lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    np.testing.assert_allclose(spread, whole, rtol=1e-5)
    assert len({row.tobytes() for row in whole}) == 8


def test_trajectory_ends_where_sample_does():
    keys = df.sample_keys(KEY, jnp.arange(3))
    x_init = df.initial_noise(keys, (4, 4, 1))
    plan = df.make_plan(SCHEDULE, "ddpm", steps=7)
    x, x0 = df.trajectory(toy_model, plan, x_init, keys, num_steps=7, clip=True)
    assert x.shape == x0.shape == (7, 3, 4, 4, 1)
    np.testing.assert_allclose(x[-1], df.sample(toy_model, plan, x_init, keys, clip=True), rtol=1e-5)
    assert np.abs(x0).max() <= 1


@pytest.mark.parametrize(
    ("sampler", "spacing", "eta", "steps"),
    [
        ("ddim", "adm", 0.0, 1000),
        ("ddim", "trailing", 1.0, 1000),
        ("ddpm", "leading", 0.0, 1000),
        ("ddpm_large", "leading", 0.0, 1000),
    ],
)
def test_samplers_recover_a_gaussian_from_its_exact_denoiser(sampler, spacing, eta, steps):
    mean, std = 0.3, 0.2
    abar = jnp.asarray(SCHEDULE.alphas_cumprod, jnp.float32)

    def model(x, t):  # E[eps | x_t] when x_0 ~ N(mean, std^2)
        a = abar[t][:, None]
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * mean) / (a * std**2 + 1 - a)

    keys = df.sample_keys(KEY, jnp.arange(64))
    plan = df.make_plan(SCHEDULE, sampler, steps=steps, spacing=spacing, eta=eta)
    x = np.asarray(df.sample(model, plan, df.initial_noise(keys, (256,)), keys, clip=False))
    assert abs(x.mean() - mean) < 0.005 and abs(x.std() / std - 1) < 0.025


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: df.make_schedule("linaer"), "diffusion.schedule = 'linaer'.*linear, scaled_linear, cosine"),
        (lambda: df.make_schedule("linear", 1), "diffusion.num_steps = 1"),
        (lambda: df.make_schedule("linear", 10), r"num_steps = 10.*\(0, 1\)"),
        (lambda: df.make_plan(SCHEDULE, "ddmi"), "sample.sampler = 'ddmi'.*ddim, ddpm"),
        (lambda: df.make_plan(SCHEDULE, steps=0), "sample.steps = 0.*1..1000"),
        (lambda: df.make_plan(SCHEDULE, steps=1001), "sample.steps = 1001.*1..1000"),
        (lambda: df.make_plan(SCHEDULE, spacing="even"), "sample.spacing = 'even'.*leading, trailing"),
        (lambda: df.make_plan(SCHEDULE, eta=1.5), "sample.eta = 1.5"),
        (lambda: df.make_plan(SCHEDULE, "ddpm", eta=0.5), "sample.eta = 0.5.*0 for other samplers"),
        (lambda: df.sections(1000, "ddim300"), "no integer stride takes exactly 300"),
        (lambda: df.sections(10, "4,7"), "section 1 has 5 timesteps, of which 7"),
    ],
)
def test_errors_name_field_value_and_what_is_allowed(call, words):
    with pytest.raises(ConfigError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
