"""The fast forms of convolutions against the plain ones, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import ConfigError
from jaxdiff.models import forms
from jaxdiff.models.attention import Attention
from jaxdiff.models.layers import (
    FORMS,
    Conv1x1,
    Conv3x3,
    ResBlock,
    convolve,
    convolve_few,
    project_convolve,
    upsample,
)
from jaxdiff.models.norm import BiasPending, GroupNorm, add_bias, settle
from jaxdiff.training.flops import count_flops

KEY = jax.random.key(0, impl="rbg")


def draw(seed, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape)


@pytest.mark.parametrize(
    ("fast", "plain"),
    [
        FORMS["up"],
        (project_convolve, lambda x, kernel: convolve(x, kernel)),
    ],
)
def test_fast_forms(fast, plain):
    x, kernel = draw(0, 2, 5, 4, 8), draw(1, 3, 3, 8, 3)
    weight = draw(2, *plain(x, kernel).shape)

    def both(function):
        return jax.jit(jax.value_and_grad(lambda x, k: (function(x, k) * weight).sum(), argnums=(0, 1)))(x, kernel)

    np.testing.assert_allclose(fast(x, kernel), plain(x, kernel), rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(both(fast)), jax.tree.leaves(both(plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max())


def test_upsampled_pixels_are_multiplied_once():
    x, kernel = draw(0, 1, 64, 64, 8), draw(1, 3, 3, 8, 8)

    def gradients(function):
        return lambda x, k: jax.vjp(function, x, k)[1](upsample(x))

    fast, plain = FORMS["up"]
    ratio = count_flops(fast, x, kernel) / count_flops(plain, x, kernel)
    np.testing.assert_allclose(ratio, 4 / 9, rtol=0.01)
    ratio = count_flops(gradients(fast), x, kernel) / count_flops(gradients(plain), x, kernel)
    np.testing.assert_allclose(ratio, 4 / 9, rtol=0.01)


def test_few_channels_are_filled_up_in_half_precision_on_a_gpu(monkeypatch):
    x, kernel, dy = draw(0, 2, 6, 5, 3), draw(1, 3, 3, 3, 8), draw(2, 2, 6, 5, 8)

    def both(function, dtype):
        y, gradients = jax.vjp(function, x.astype(dtype), kernel)
        return y, *gradients(dy.astype(dtype))

    expected, of_half = both(convolve, jnp.float32), both(convolve, jnp.bfloat16)
    monkeypatch.setattr(forms, "CAPABILITY", 9.0)
    for dtype, channels in ((jnp.float32, 3), (jnp.bfloat16, 16)):
        assert f"[3,3,{channels},8]" in str(jax.make_jaxpr(convolve_few)(x.astype(dtype), kernel))
    for a, b in zip(both(convolve_few, jnp.float32), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(both(convolve_few, jnp.bfloat16), of_half, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.01 * np.abs(b).max())


def test_few_features_are_summed_in_float32():
    x, kernel = draw(0, 1, 4, 4, 64).astype(jnp.bfloat16), draw(1, 3, 3, 64, 3)
    y = project_convolve(x, kernel)
    assert y.dtype == jnp.float32
    rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(y, convolve(x.astype(jnp.float32), rounded), rtol=1e-4, atol=1e-4)


def test_biases():
    x, params = draw(0, 1, 4, 4, 8), {"params": {"kernel": draw(1, 3, 3, 8, 3), "bias": draw(2, 3)}}
    conv = Conv3x3(3, jnp.float32)
    plain = conv.apply(params, x)
    apart, bias, _ = conv.clone(bias_apart=True).apply(params, x)
    np.testing.assert_allclose(plain, apart + bias[None, None, None], rtol=1e-6)
    np.testing.assert_allclose(plain, conv.clone(form="few").apply(params, x), rtol=1e-4, atol=1e-5)


def test_a_concatenation_that_is_not_made():
    parts = draw(0, 2, 4, 4, 8), draw(1, 2, 4, 4, 3)
    params = {"params": {"kernel": draw(2, 1, 1, 11, 5), "bias": draw(3, 5)}}
    conv, whole = Conv1x1(5, jnp.float32), jnp.concatenate(parts, axis=-1)
    expected = jnp.einsum("bhwc,cf->bhwf", whole, params["params"]["kernel"][0, 0]) + draw(3, 5)[None, None, None]
    for pieces in (parts, (whole,)):
        kernels, bias = conv.apply(params, [piece.shape[-1] for piece in pieces])
        y = sum(piece @ kernel for piece, kernel in zip(pieces, kernels, strict=True))
        np.testing.assert_allclose(add_bias(y, bias), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["norm", "attention", "block", "wider block", "block of two"])
def test_what_a_map_lacks_is_added_by_whoever_uses_it(kind):
    x, bias, other = draw(0, 2, 4, 4, 16), draw(1, 16), draw(2, 2, 4, 4, 8)
    parts = (other, x) if kind == "block of two" else (x,)
    if kind == "norm":
        block = GroupNorm(4, 1e-5, jnp.float32, silu=True)
    elif kind == "attention":
        block = Attention(8, jnp.float32, zero_init=False, norm_groups=4)
    else:
        block = ResBlock(16 if kind == "block" else 24, jnp.float32, zero_init=False, norm_groups=4)

    def loss(params, bias, map_of):
        whole = [map_of(x, bias) if part is x else part for part in parts]
        y = block.apply(params, whole[0] if kind == "attention" else whole)
        y = settle(y if kind == "attention" else y[0])
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum()

    def value_and_gradients(map_of):
        return jax.value_and_grad(loss, argnums=(0, 1))(params, bias, map_of)

    params = block.init(KEY, x if kind == "attention" else parts)
    (a, da), (b, db) = value_and_gradients(BiasPending), value_and_gradients(add_bias)
    np.testing.assert_allclose(a, b, rtol=1e-4)
    for one, two in zip(jax.tree.leaves(da), jax.tree.leaves(db), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4 * max(1, np.abs(two).max()))


def test_plain_forms_on_demand(monkeypatch):
    x = draw(0, 1, 4, 4, 8)
    for form in ("up", "few"):
        conv = Conv3x3(3, jnp.float32, form=form)
        params = conv.init(KEY, x)
        monkeypatch.delenv("JAXDIFF_FORMS", raising=False)
        fast, fast_text = conv.apply(params, x), str(jax.make_jaxpr(conv.apply)(params, x))
        monkeypatch.setenv("JAXDIFF_FORMS", "plain")
        plain = str(jax.make_jaxpr(conv.apply)(params, x))
        mark = {"up": "lhs_dilation=(2, 2)", "few": "dot_general["}[form]
        assert plain.count("conv_general_dilated[") == 1 and mark in fast_text and mark not in plain
        np.testing.assert_allclose(conv.apply(params, x), fast, rtol=1e-4, atol=1e-5)
    monkeypatch.setenv("JAXDIFF_FORMS", "fast")
    with pytest.raises(ConfigError, match="JAXDIFF_FORMS = fast: must be plain or not set"):
        conv.apply(params, x)
