"""The autoencoder's loss against a discriminator: its gradients, its weight, and that both sides are trained."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import mesh as meshes
from jaxdiff.errors import Stopped
from jaxdiff.models import Posterior
from jaxdiff.models.discriminator import PatchDiscriminator
from jaxdiff.models.perceptual import Perceptual
from jaxdiff.training import adversarial, experiments
from jaxdiff.training.adversarial import Adversary, autoencoder_objective
from jaxdiff.training.optimizer import make_optimizer
from jaxdiff.training.stages import run_train
from jaxdiff.training.step import make_init, make_train_step
from tests.training.test_resume import leaves, records


class ToyDecoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        h = jnp.tanh(nn.ConvTranspose(4, (2, 2), 2, name="up")(z))
        return nn.Conv(3, (3, 3), name="conv_out")(h)


class ToyAutoencoder(nn.Module):
    """What the objective needs of AutoencoderKL, and compiled in a moment."""

    latent_channels: int = 2
    downsampling: int = 2
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, image, noise):
        posterior = Posterior(*jnp.split(nn.Conv(4, (2, 2), 2, name="encoder")(image), 2, axis=-1))
        return ToyDecoder(name="decoder")(posterior.sample(noise)), posterior


MODEL = ToyAutoencoder()
DISCRIMINATOR = PatchDiscriminator(4, 1)
KL_WEIGHT, PERCEPTUAL_WEIGHT, ADVERSARIAL_WEIGHT = 0.1, 0.3, 0.7
VALUES = 16 * 16 * 3
BATCH = 8


def distance(params, a, b, dtype):
    return jnp.square((a - b) @ params["w"]).mean((1, 2, 3))


FROZEN = {"w": np.random.default_rng(5).standard_normal((3, 4)).astype(np.float32)}


def objective_of(start, weight=ADVERSARIAL_WEIGHT):
    return autoencoder_objective(
        MODEL,
        kl_weight=KL_WEIGHT,
        perceptual=Perceptual("toy_distance", FROZEN, distance),
        perceptual_weight=PERCEPTUAL_WEIGHT,
        adversary=Adversary(DISCRIMINATOR, weight, start) if weight else None,
    )


@pytest.fixture(scope="module")
def setting():
    """Parameters of both sides, and prepared inputs."""
    rng = np.random.default_rng(0)
    image, noise = rng.uniform(-1, 1, (BATCH, 16, 16, 3)), rng.standard_normal((BATCH, 8, 8, 2))
    inputs = {"image": jnp.float32(image), "noise": jnp.float32(noise)}
    params = jax.jit(MODEL.init)(jax.random.key(0), inputs["image"], inputs["noise"])
    critic = {"discriminator": DISCRIMINATOR.init(jax.random.key(1), inputs["image"]), "logvar": jnp.float32(-0.4)}
    return params, critic, inputs


def written_out(params, critic, inputs):
    """The losses of both sides from their definitions, each with a gradient of its own."""

    def decode(p):
        return MODEL.apply(p, inputs["image"], inputs["noise"])

    def nll(p, logvar=critic["logvar"]):
        difference = decode(p)[0] - inputs["image"]
        error = jnp.abs(difference).mean() + PERCEPTUAL_WEIGHT * distance(FROZEN, difference, 0, None).mean()
        return error / jnp.exp(logvar) + logvar

    def deceive(p):
        return -DISCRIMINATOR.apply(critic["discriminator"], decode(p)[0]).mean()

    def last_layer(tree):
        return jnp.linalg.norm(tree["params"]["decoder"]["conv_out"]["kernel"])

    weight = ADVERSARIAL_WEIGHT * last_layer(jax.grad(nll)(params)) / (last_layer(jax.grad(deceive)(params)) + 1e-4)

    def generator(p):
        return nll(p) + weight * deceive(p) + KL_WEIGHT * decode(p)[1].kl().mean() / VALUES

    def hinge(d):
        real, fake = DISCRIMINATOR.apply(d, inputs["image"]), DISCRIMINATOR.apply(d, decode(params)[0])
        return (jnp.maximum(0, 1 - real).mean() + jnp.maximum(0, 1 + fake).mean()) / 2

    to_critic = {
        "discriminator": jax.grad(hinge)(critic["discriminator"]),
        "logvar": jax.grad(nll, 1)(params, critic["logvar"]),
    }
    return jax.grad(generator)(params), to_critic, weight


def assert_close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), a, b)


def test_gradients_are_those_of_the_losses(setting, monkeypatch):
    monkeypatch.setattr(adversarial, "MAX_WEIGHT", 1e9)
    objective = objective_of(3)
    (to_params, to_critic), metrics = jax.jit(objective.critic.gradient)(*setting, jnp.int32(3), FROZEN)
    params, critic, weight = jax.jit(written_out)(*setting)
    assert float(metrics["g_weight"]) == pytest.approx(float(weight), rel=1e-4)
    assert_close((to_params, to_critic), (params, critic))
    loss, details = objective.loss(setting[0], setting[2], jax.random.key(0), FROZEN)
    assert float(metrics["loss"]) == pytest.approx(float(loss.mean()), rel=1e-5)
    assert float(metrics["psnr"]) == pytest.approx(float(details["psnr"].mean()), rel=1e-5)


def test_the_weight_has_a_bound(setting, monkeypatch):
    monkeypatch.setattr(adversarial, "MAX_WEIGHT", 1e-3)
    _, metrics = jax.jit(objective_of(0).critic.gradient)(*setting, jnp.int32(0), FROZEN)
    assert float(metrics["g_weight"]) == pytest.approx(ADVERSARIAL_WEIGHT * 1e-3 / VALUES)


def test_no_discriminator_before_its_start(setting):
    params, critic, inputs = setting
    objective = objective_of(3)
    (to_params, to_critic), metrics = jax.jit(objective.critic.gradient)(*setting, jnp.int32(2), FROZEN)
    assert float(optax.tree.norm(to_critic["discriminator"])) == 0 and float(metrics["d_loss"]) == 0
    assert float(to_critic["logvar"]) != 0 and float(metrics["g_weight"]) == 0

    def nll(p):
        error, _ = objective_of(0, 0).loss(p, inputs, jax.random.key(0), FROZEN)
        kl = KL_WEIGHT / VALUES * MODEL.apply(p, inputs["image"], inputs["noise"])[1].kl()
        return ((error - kl) / jnp.exp(critic["logvar"]) + kl).mean()

    assert_close(to_params, jax.jit(jax.grad(nll))(params))
    assert objective_of(0, 0).critic is None


def test_validation_measures_similarity_too():
    image = jnp.zeros((BATCH, 16, 16, 3))
    params = jax.jit(MODEL.init)(jax.random.key(0), image, jnp.zeros((BATCH, 8, 8, 2)))
    inputs = {"image": image, "noise": jnp.zeros((BATCH, 8, 8, 2))}
    _, metrics = objective_of(0).loss(params, inputs, None, FROZEN)
    assert metrics.keys() == {"kl", "psnr", "toy_distance", "ssim"}
    assert all(value.shape == (BATCH,) for value in metrics.values())


def run(devices, accumulate=1, start=1, lr=1e-2, steps=3):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    objective, optimizer = objective_of(start), make_optimizer(lambda n: lr, 0.0, 1e9, (0.5, 0.9))
    shapes = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 8, 8, 2))
    state = make_init(lambda key: MODEL.init(key, *shapes), optimizer, mesh, objective.critic)(jax.random.key(0))
    step = make_train_step(objective, optimizer, lambda n: lr, mesh, seed=0, ema_decay=0.9, accumulate=accumulate)
    states, metrics = [jax.tree.map(np.asarray, state)], []
    for k in range(steps):
        image = np.random.default_rng(k).integers(0, 256, (BATCH, 16, 16, 3), np.uint8)
        state, one = step(state, {"image": image}, FROZEN)
        states.append(jax.tree.map(np.asarray, state))
        metrics.append({name: float(value) for name, value in one.items()})
    return states, metrics


@pytest.fixture(scope="module")
def one_device():
    return run(1)


def test_both_sides_are_trained(one_device):
    states, metrics = one_device

    def moved(before, after, field):
        return jax.tree.map(lambda a, b: bool((a != b).any()), getattr(before, field), getattr(after, field))

    assert any(jax.tree.leaves(moved(states[0], states[1], "params")))
    first, second = (moved(states[i], states[i + 1], "critic") for i in (0, 1))
    assert first["logvar"] and second["logvar"]  # the learnt log variance is trained from the first step
    assert not any(jax.tree.leaves(first["discriminator"])) and any(jax.tree.leaves(second["discriminator"]))
    # d/ds (error exp(-s) + s) at s = 0 is 1 - error, and Adam's first step is the learning rate.
    error = metrics[0]["loss"] - KL_WEIGHT * metrics[0]["kl"] / VALUES
    assert states[0].critic["logvar"] == 0 and abs(error - 1) > 0.01
    assert states[1].critic["logvar"] == pytest.approx(1e-2 * np.sign(error - 1), rel=1e-4)
    assert metrics[0]["d_loss"] == 0 < metrics[1]["d_loss"]


def test_devices_do_not_matter(one_device):
    states, metrics = run(8)
    for a, b in zip(metrics, one_device[1], strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-4)


def test_parts_are_averaged(one_device):
    """The adaptive weight is that of each part, the rest is the same mean."""
    _, metrics = run(1, accumulate=2, steps=1)
    assert metrics[0] == pytest.approx(one_device[1][0], rel=1e-4)


def test_an_autoencoder_and_its_discriminator(tiny, tmp_path, monkeypatch):
    """Trained, validated and drawn; stopped before the discriminator plays, and gone on with."""

    def distance(params, a, b, dtype):  # compiled in a moment
        return jax.numpy.square(a - b).mean((1, 2, 3)) * params["w"]

    monkeypatch.setattr(experiments, "load_perceptual", lambda path: Perceptual("toy", {"w": np.float32(2)}, distance))
    one = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    monkeypatch.setattr(meshes, "make_mesh", lambda: one)  # what eight do is tested above
    config = tiny("vae")
    config.update(steps=6, log_every=2)
    config.data.update(flip=True, image_size=8)
    config.autoencoder.update(channels=4, channel_mult=(1,), perceptual_weight=0.1)
    config.autoencoder.update(disc_weight=0.5, disc_start=0.5, disc_layers=1)
    scores = run_train(config, tmp_path / "whole")
    assert scores.keys() == {f"val_{name}" for name in ("loss", "kl", "psnr", "ssim", "toy")}
    assert list((tmp_path / "whole" / "samples").glob("autoencoder-0000006-raw-ema.png"))
    by_step = {r["step"]: r for r in records(tmp_path / "whole") if "d_loss" in r}
    assert by_step[2]["d_loss"] == 0 and by_step[6]["d_loss"] > 0 and by_step[6]["logvar"] != 0

    with pytest.raises(Stopped):
        run_train(config, tmp_path / "parts", stop_at=3)
    run_train(config, tmp_path / "parts")
    (_, mine, _), (_, reference, _) = leaves(tmp_path / "parts"), leaves(tmp_path / "whole")
    assert mine.keys() == reference.keys() and any("discriminator" in name for name in mine)
    assert all(value.tobytes() == mine[name].tobytes() for name, value in reference.items())
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
