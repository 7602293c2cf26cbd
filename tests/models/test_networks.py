"""Parameter counts of the published architectures, and what the forward passes promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models import AutoencoderKL, UNet
from jaxdiff.models.attention import attend
from jaxdiff.models.layers import count_params, timestep_embedding

KEY = jax.random.key(0, impl="rbg")  # compiles faster than threefry
DDPM = dict(channels=128, channel_mult=(1, 2, 2, 2), scale_shift_norm=False, resblock_updown=False)
ADM128 = dict(channels=256, channel_mult=(1, 1, 2, 3, 4), attention_resolutions=(32, 16, 8), num_classes=999)
ADM64 = dict(
    channels=192,
    channel_mult=(1, 2, 3, 4),
    num_res_blocks=3,
    attention_resolutions=(32, 16, 8),
    num_classes=999,
)


@pytest.mark.parametrize(
    ("fields", "out", "size", "count"),
    [(DDPM, 3, 32, 35_746_307), (ADM128, 6, 128, 421_529_606), (ADM64, 6, 64, 295_904_454)],
)
def test_unet_parameter_counts(fields, out, size, count):
    # ADM's 1000-row class table has no null class; ours has one row more than classes, hence 999.
    x, t = jnp.zeros((1, size, size, 3)), jnp.zeros((1,), jnp.int32)
    assert count_params(jax.eval_shape(UNet(out, **fields).init, KEY, x, t, t)) == count


@pytest.mark.parametrize(("z", "mult", "count"), [(3, (1, 2, 4), 55_312_063), (4, (1, 2, 4, 4), 83_653_863)])
def test_autoencoder_parameter_counts(z, mult, count):
    model = AutoencoderKL(z, channel_mult=mult)
    noise = jnp.zeros((1, 32 // model.downsampling, 32 // model.downsampling, z))
    params = jax.eval_shape(model.init, KEY, jnp.zeros((1, 32, 32, 3)), noise)
    assert count_params(params) == count
    decoded, _ = jax.eval_shape(model.apply, params, jnp.zeros((1, 32, 32, 3)), noise)
    assert decoded.shape == (1, 32, 32, 3)


def test_f16():
    model = AutoencoderKL(16, channel_mult=(1, 1, 2, 2, 4), attention_levels=(4,))
    params = jax.eval_shape(model.init, KEY, jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 4, 4, 16)))
    decoded, posterior = jax.eval_shape(model.apply, params, jnp.zeros((1, 64, 64, 3)), jnp.zeros((1, 4, 4, 16)))
    assert count_params(params) == 69_610_963  # as in docs/autoencoder.md
    assert decoded.shape == (1, 64, 64, 3) and posterior.mean.shape == (1, 4, 4, 16)
    attentions = {part: [n for n in params["params"][part] if n.endswith("_attn")] for part in ("encoder", "decoder")}
    assert {part: sorted(names) for part, names in attentions.items()} == {
        "encoder": ["down4_0_attn", "down4_1_attn", "mid_attn"],
        "decoder": ["mid_attn", "up4_0_attn", "up4_1_attn", "up4_2_attn"],
    }


SMALL = dict(channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), head_dim=16)


def randomised(model, *inputs):
    """Parameters without the zeros of the initialisation, which hide the inputs from the output."""
    params = jax.jit(model.init)(KEY, *inputs)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [a + 0.1 * rng.standard_normal(a.shape).astype(np.float32) for a in leaves])


@pytest.fixture(scope="module")
def small():
    model = UNet(3, num_classes=4, context_tokens=3, dropout=0.5, **SMALL)
    x = np.random.default_rng(1).standard_normal((2, 8, 8, 3)).astype(np.float32)
    inputs = x, jnp.array([3, 900]), jnp.array([0, 4])
    return jax.jit(model.apply, static_argnums=4), randomised(model, *inputs), inputs


def test_new_unet_predicts_zero():
    model = UNet(3, **SMALL)
    x, t = jnp.ones((1, 8, 8, 3)), jnp.ones((1,))
    assert (jax.jit(lambda key: model.apply(model.init(key, x, t), x, t))(KEY) == 0).all()


def test_unet_uses_every_input(small):
    apply, params, (x, t, y) = small
    out = apply(params, x, t, y)
    assert out.shape == x.shape and out.dtype == jnp.float32
    for changed in [(x * 0.5, t, y), (x, t + 50, y), (x, t, (y + 1) % 5)]:
        assert (jnp.abs(apply(params, *changed) - out).max(axis=(1, 2, 3)) > 1e-3).all()


def test_class_reaches_the_output_through_cross_attention_alone(small):
    apply, params, (x, t, y) = small
    silent = jax.tree.map(lambda a: a, params)
    silent["params"]["class_emb"]["embedding"] = jnp.zeros_like(silent["params"]["class_emb"]["embedding"])
    a, b = apply(silent, x, t, y), apply(silent, x, t, (y + 1) % 5)
    assert (jnp.abs(a - b).max(axis=(1, 2, 3)) > 1e-3).all()


def test_dropout_only_when_training(small):
    apply, params, inputs = small
    assert (apply(params, *inputs) == apply(params, *inputs)).all()
    a, b = (apply(params, *inputs, False, rngs={"dropout": jax.random.key(k)}) for k in (0, 1))
    assert (a != b).any()


def test_samples_of_a_batch_do_not_mix(small):
    apply, params, (x, t, y) = small
    one = apply(params, x[:1], t[:1], y[:1])
    np.testing.assert_allclose(one[0], apply(params, x, t, y)[0], atol=1e-5)


def test_bfloat16_stays_near_float32(small):
    apply, params, inputs = small
    half = UNet(3, num_classes=4, context_tokens=3, dtype=jnp.bfloat16, **SMALL)
    out, exact = jax.jit(half.apply)(params, *inputs), apply(params, *inputs)
    assert out.dtype == jnp.float32
    error = jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)
    assert 0 < error < 0.03


def test_unconditional_unet_needs_no_label():
    model = UNet(3, **SMALL)
    x, t = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1,))
    names = jax.eval_shape(model.init, KEY, x, t)["params"].keys()
    assert not [n for n in names if "class" in n or "cross" in n]


def test_attention_is_softmax_attention():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 3, 8)).astype(np.float32) for n in (5, 7, 7))
    logits = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(attend(q, k, v), np.einsum("bhnm,bmhd->bnhd", weights, v), atol=1e-5)


def test_timestep_embedding():
    t = np.array([0, 1, 999])
    emb = np.asarray(timestep_embedding(jnp.asarray(t), 8))
    freqs = 10_000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(np.outer(t, freqs)), np.sin(np.outer(t, freqs))], axis=1)
    np.testing.assert_allclose(emb, expected, atol=1e-4)


def test_autoencoder_posterior_and_decoding():
    model = AutoencoderKL(4, 8, (1, 2, 2), 1)
    image = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    noise = np.random.default_rng(1).standard_normal((2, 4, 4, 4)).astype(np.float32)
    params = jax.jit(model.init)(KEY, image, noise)
    encode = jax.jit(lambda image: model.apply(params, image, method="encode"))
    posterior = encode(image)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, 4, 4)
    decoded, _ = jax.jit(model.apply)(params, image, noise)
    decode = jax.jit(lambda z: model.apply(params, z, method="decode"))
    again = decode(posterior.mean + np.exp(posterior.logvar / 2) * noise)
    np.testing.assert_allclose(decoded, again, atol=1e-5)
    unit = posterior._replace(mean=jnp.zeros_like(noise), logvar=jnp.zeros_like(noise))
    assert (unit.kl() == 0).all() and (posterior.kl() > 0).all()
    loud = encode(image * 1e4)
    assert loud.logvar.max() <= 20 and loud.logvar.min() >= -30
