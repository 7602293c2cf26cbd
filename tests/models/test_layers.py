"""The fast forms of convolutions against the plain ones, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.errors import ConfigError
from jaxdiff.models.layers import Conv1x1, Conv3x3, convolve, project_convolve, upsample, upsample_convolve
from jaxdiff.models.norm import add_bias

KEY = jax.random.key(0, impl="rbg")


def draw(seed, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, seed), shape)


@pytest.mark.parametrize(
    ("fast", "plain"),
    [
        (upsample_convolve, lambda x, kernel: convolve(upsample(x), kernel)),
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
    apart, bias = conv.clone(bias_apart=True).apply(params, x)
    np.testing.assert_allclose(plain, apart + bias[None, None, None], rtol=1e-6)
    np.testing.assert_allclose(plain, conv.clone(form="few").apply(params, x), rtol=1e-4, atol=1e-5)


def test_a_concatenation_that_is_not_made():
    parts = draw(0, 2, 4, 4, 8), draw(1, 2, 4, 4, 3)
    params = {"params": {"kernel": draw(2, 1, 1, 11, 5), "bias": draw(3, 5)}}
    conv, whole = Conv1x1(5, jnp.float32), jnp.concatenate(parts, axis=-1)
    expected = jnp.einsum("bhwc,cf->bhwf", whole, params["params"]["kernel"][0, 0]) + draw(3, 5)[None, None, None]
    for pieces in (parts, (whole,)):
        y, bias = conv.apply(params, pieces)
        np.testing.assert_allclose(add_bias(y, bias), expected, rtol=1e-5, atol=1e-5)


def test_plain_forms_on_demand(monkeypatch):
    x = draw(0, 1, 4, 4, 8)
    for form in ("up", "few"):
        conv = Conv3x3(3, jnp.float32, form=form)
        params = conv.init(KEY, x)
        monkeypatch.delenv("JAXDIFF_FORMS", raising=False)
        fast, products = conv.apply(params, x), str(jax.make_jaxpr(conv.apply)(params, x))
        monkeypatch.setenv("JAXDIFF_FORMS", "plain")
        plain = str(jax.make_jaxpr(conv.apply)(params, x))
        assert plain.count("conv_general_dilated[") == 1 != products.count("conv_general_dilated[")
        np.testing.assert_allclose(conv.apply(params, x), fast, rtol=1e-4, atol=1e-5)
    monkeypatch.setenv("JAXDIFF_FORMS", "fast")
    with pytest.raises(ConfigError, match="JAXDIFF_FORMS = fast: must be plain or not set"):
        conv.apply(params, x)
