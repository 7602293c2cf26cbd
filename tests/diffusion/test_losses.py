"""What is minimised: weights, times, their memory, and guided-diffusion's hybrid loss."""

import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import diffusion as df
from jaxdiff.data.latents import Whitening
from jaxdiff.training.objectives import Recipe, diffusion_objective

ADM = np.load(pathlib.Path(__file__).parent.parent / "golden" / "guided_diffusion.npz")
X0, NOISE, EPS, V, T = (ADM[f"in/{k}"] for k in ("x0", "noise", "model_eps", "model_v", "t"))
INPUTS = {"x0": X0, "eps": NOISE, "t": T, "y": T, "weight": np.ones(len(T), np.float32)}
LINEAR = df.make_schedule("linear", beta_start=1e-4, beta_end=0.02)


def fake(params, x, t, y, deterministic, rngs=None):
    """A network whose parameters are added to a fixed output."""
    return jnp.concatenate([EPS + params["eps"], V + params["v"]], axis=-1)


NETWORK, NONE = SimpleNamespace(apply=fake), {"eps": 0.0, "v": 0.0}


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_hybrid_loss_of_guided_diffusion(name):
    schedule = df.make_schedule(name, beta_start=1e-4, beta_end=0.02)
    objective = diffusion_objective(NETWORK, schedule, Recipe(0.1, loss="hybrid"), null_label=10)
    loss, metrics = objective.loss(NONE, INPUTS, None, ())
    golden = f"{name}/LEARNED_RANGE/training_losses"
    np.testing.assert_allclose(metrics["mse"], ADM[f"{golden}/mse"], rtol=1e-5)
    np.testing.assert_allclose(metrics["vlb"][1:] / 1000, ADM[f"{golden}/vb"][1:], rtol=1e-4)
    np.testing.assert_allclose(loss[1:], ADM[f"{golden}/loss"][1:], rtol=1e-4)
    assert T[0] == 0 and float(loss[0]) == pytest.approx(ADM[f"{golden}/loss"][0], rel=0.02)  # see test_parity.py


def test_the_bound_trains_the_variance_alone_in_the_hybrid_loss():
    def gradient(loss):
        objective = diffusion_objective(NETWORK, LINEAR, Recipe(0.1, loss=loss), null_label=10)
        return jax.jit(jax.grad(lambda params: objective.loss(params, INPUTS, None, ())[0].mean()))(NONE)

    hybrid, vlb, mse = gradient("hybrid"), gradient("vlb"), gradient("mse")
    assert float(hybrid["eps"]) == pytest.approx(float(mse["eps"]), rel=1e-5) and mse["v"] == 0
    assert float(hybrid["v"]) == pytest.approx(float(vlb["v"]) / 1000, rel=1e-4) and abs(vlb["v"]) > 0.1
    assert abs(vlb["eps"]) > 0.1


def test_latents_have_a_kl_at_the_first_step_too():
    discrete, latent = (
        df.vlb_term(LINEAR, X0, X0 + 0.01 * NOISE, jnp.asarray(T), X0 + 0.1 * EPS, discrete=d) for d in (True, False)
    )
    np.testing.assert_array_equal(discrete[1:], latent[1:])
    pred, x = X0 + 0.1 * EPS, X0 + 0.01 * NOISE
    q, p = (df.q_posterior(LINEAR, image, x, jnp.asarray(T)) for image in (X0, pred))
    kl = jnp.square(q.mean - p.mean)[0] / (2 * jnp.exp(p.log_variance[0]))  # of equal variances
    assert latent[0] == pytest.approx(float(kl.mean() / np.log(2)), rel=1e-4) and latent[0] != discrete[0]
    recipe = Recipe(0.1, loss="hybrid")
    objectives = (
        diffusion_objective(NETWORK, LINEAR, recipe, null_label=10, whitening=w)
        for w in (None, Whitening([0.0] * 3, [1.0] * 3))
    )
    pixels, latents = (o.loss(NONE, INPUTS, None, ())[1]["vlb"] for o in objectives)
    np.testing.assert_array_equal(pixels[1:], latents[1:])
    assert pixels[0] != latents[0]


def test_likelihood_is_the_sum_of_its_terms():
    schedule = df.make_schedule("linear", 60)

    def noise(t):
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), t), X0.shape)

    bound = df.likelihood_bound(schedule, lambda x, t: (0.9 * X0, None), X0, noise, discrete=True)
    for t in (0, 31, 59):
        times = jnp.full(len(X0), t)
        x = df.q_sample(schedule, X0, times, noise(t))
        term = df.vlb_term(schedule, X0, x, times, 0.9 * X0, discrete=True)
        np.testing.assert_allclose(bound.terms[t], term, rtol=1e-5)
    np.testing.assert_allclose(bound.total, bound.terms.sum(0) + df.prior_bits(schedule, X0), rtol=1e-5)

    def beyond(clip, least, most):
        model = lambda x, t: (jnp.clip(9.0 * X0, least, most), None)  # noqa: E731
        return df.likelihood_bound(schedule, model, X0, noise, discrete=True, clip=clip).total

    np.testing.assert_array_equal(beyond(True, -9, 9), beyond(False, -1, 1))
    assert (beyond(False, -9, 9) > 2 * beyond(True, -9, 9)).all()


def test_published_weights():
    a, s = LINEAR.levels(jnp.array([100]))
    snr = float(a[0] ** 2 / s[0] ** 2)
    assert snr == pytest.approx(8.5366696, rel=1e-5)

    def weight(weighting, prediction, gamma, a=a, s=s):
        target = df.PREDICTIONS[prediction].target(a, s, 0.5)
        return float(df.weight_of(weighting, target, a, s, gamma)[0])

    assert weight("min_snr", "eps", 5.0) == pytest.approx(5 / snr, rel=1e-5)
    assert weight("min_snr", "v", 5.0) == pytest.approx(5 / (snr + 1), rel=1e-5)
    assert weight("min_snr", "x0", 5.0) == pytest.approx(5, rel=1e-5)
    assert weight("p2", "eps", 1.0) == pytest.approx(1 / (1 + snr), rel=1e-5)
    assert weight("simple", "v", 0.0) == 1
    sigma = jnp.array([2.0])
    assert weight("edm", "x0", 0.5, jnp.ones(1), sigma) == pytest.approx((4 + 0.25) / (2 * 0.5) ** 2, rel=1e-5)
    assert weight("edm", "edm", 0.5, jnp.ones(1), sigma) == pytest.approx(1, rel=1e-5)


def test_edm_preconditioning_as_published():
    sigma, sd = 3.0, 0.5
    target = df.PREDICTIONS["edm"].target(1.0, sigma, sd)
    c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / np.sqrt(sigma**2 + sd**2)
    x, f = 1.7, -0.4
    assert df.to_x0(target, 1.0, sigma, x, f) == pytest.approx(c_skip * x + c_out * f)
    assert df.PREDICTIONS["edm"].input_scale(1.0, sigma, sd) == pytest.approx(1 / np.sqrt(sigma**2 + sd**2))
    assert df.Edm().network_time(jnp.array([sigma]))[0] == pytest.approx(1000 * np.log(sigma) / 4)


def test_times_have_their_distributions():
    u = df.sample_unit(jax.random.key(0), 100_000)
    t = np.asarray(df.TIMES["lognormal"].quantile(u, -1.2, 1.2))
    assert np.log(t).mean() == pytest.approx(-1.2, abs=0.02) and np.log(t).std() == pytest.approx(1.2, abs=0.02)
    t = np.asarray(df.TIMES["logit_normal"].quantile(u, 0.5, 2.0))
    logit = np.log(t / (1 - t))
    assert t.min() > 0 and t.max() < 1
    assert logit.mean() == pytest.approx(0.5, abs=0.03) and logit.std() == pytest.approx(2, abs=0.03)


def test_stratified_times_are_uniform_and_even_in_every_batch():
    draw = jax.jit(lambda key: df.sample_timesteps(key, 50, 1000, stratified=True))
    t = np.stack([draw(jax.random.key(k)) for k in range(200)])
    assert (np.bincount(t[0] // 20, minlength=50) == 1).all()  # one in each of 50 parts
    assert t.min() >= 0 and t.max() <= 999 and np.bincount(t.ravel() // 100).min() > 950
    plain = np.stack([df.sample_timesteps(jax.random.key(k), 50, 1000) for k in range(200)])
    assert t.mean(axis=1).std() < plain.mean(axis=1).std() / 5


def test_memory_keeps_the_last_losses_of_every_timestep():
    rng, update = np.random.default_rng(0), jax.jit(df.remember)
    history, expected = df.new_history(5), [[] for _ in range(5)]
    for _ in range(8):
        t, loss = rng.integers(0, 4, 40), rng.random(40).astype(np.float32)  # some occur more than 10 times
        history = update(history, jnp.asarray(t), jnp.asarray(loss))
        for step, value in zip(t, loss, strict=True):
            expected[step].append(value)
    for step in range(4):
        assert sorted(np.asarray(history.losses[step]).tolist()) == sorted(float(v) for v in expected[step][-10:])
    assert history.seen.tolist() == [len(seen) for seen in expected]
    _, weight = df.sample_important(jax.random.key(0), 100, history)
    np.testing.assert_allclose(weight, 1, rtol=1e-5)  # a timestep was never seen


def test_importance_sampling_keeps_the_expected_loss():
    losses = np.linspace(0.1, 5, 20, dtype=np.float32)
    history = df.LossHistory(jnp.asarray(losses[:, None] * np.ones(10, np.float32)), jnp.full(20, 10))
    t, weight = df.sample_important(jax.random.key(0), 50_000, history)
    weighted = weight * losses[t]
    assert weighted.mean() == pytest.approx(losses.mean(), rel=0.01)
    assert weighted.std() < 0.05 * losses[np.random.default_rng(0).integers(0, 20, 1000)].std()


def test_the_bound_that_is_logged_is_weighted_as_the_loss_and_the_one_remembered_is_not():
    """Its mean is that of the bound, whatever the probabilities of the times that were drawn."""
    recipe = Recipe(0.1, loss="vlb", time_sampling="importance")
    objective = diffusion_objective(NETWORK, LINEAR, recipe, null_label=10)
    weight = jnp.linspace(0.2, 3.0, len(T))
    loss, metrics = objective.loss(NONE, {**INPUTS, "weight": weight}, None, ())
    plain, _ = objective.loss(NONE, {**INPUTS, "weight": jnp.ones(len(T))}, None, ())
    np.testing.assert_allclose(metrics["vlb"], weight * plain, rtol=1e-5)
    np.testing.assert_allclose(loss, metrics["vlb"], rtol=1e-6)
    history = objective.memory.update(objective.memory.initial, {**INPUTS, "weight": weight}, metrics)
    assert sorted(history.losses[history.losses != 0].tolist()) == pytest.approx(sorted(plain.tolist()), rel=1e-5)


def test_an_auxiliary_loss_is_added_and_logged():
    objective = diffusion_objective(
        NETWORK,
        LINEAR,
        Recipe(0.1, loss="hybrid"),
        null_label=10,
        auxiliary={"size": lambda params, predicted: jnp.square(predicted.output).mean(axis=(1, 2, 3))},
    )
    loss, metrics = objective.loss(NONE, INPUTS, None, ())
    plain, _ = diffusion_objective(NETWORK, LINEAR, Recipe(0.1, loss="hybrid"), null_label=10).loss(
        NONE, INPUTS, None, ()
    )
    np.testing.assert_allclose(loss, plain + np.square(np.concatenate([EPS, V], -1)).mean(axis=(1, 2, 3)), rtol=1e-5)
    assert metrics["size"].shape == (len(T),)
