"""Initialisations whose numbers come from one draw."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models import UNet
from jaxdiff.training.draws import draw_at_once

NETWORK = UNet(3, channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), head_dim=8)


def init(key):
    return NETWORK.init(key, jnp.zeros((1, 8, 8, 3)), jnp.zeros(1, jnp.int32))


@pytest.fixture(scope="module")
def both():
    key = jax.random.key(5)
    return jax.tree.map(np.asarray, (jax.jit(init)(key), jax.jit(draw_at_once(init))(key)))


def test_parameters_are_of_the_same_distribution(both):
    theirs, ours = both
    assert jax.tree.structure(theirs) == jax.tree.structure(ours)
    drawn = 0
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if np.ptp(a) == 0:  # zeros, ones
            np.testing.assert_array_equal(a, b)
        elif a.size >= 1000:
            drawn += 1
            assert abs(np.mean(b)) < 5 * np.std(a) / np.sqrt(b.size)
            assert np.std(b) == pytest.approx(np.std(a), rel=0.1)
            assert np.abs(b).max() <= 2.4 * np.std(a)  # of a normal distribution cut at two standard deviations
    assert drawn > 10


def test_no_number_is_used_twice(both):
    values = np.concatenate([np.ravel(x / np.std(x)) for x in jax.tree.leaves(both[1]) if np.ptp(x) > 0])
    assert len(np.unique(values.astype(np.float64))) > 0.99 * len(values)


def test_values_follow_from_the_key(both):
    drawn = jax.jit(draw_at_once(init))
    jax.tree.map(np.testing.assert_array_equal, drawn(jax.random.key(5)), both[1])
    kernel = [drawn(jax.random.key(seed))["params"]["conv_in"]["kernel"] for seed in (5, 6)]
    assert (kernel[0] != kernel[1]).all()


def test_one_draw_is_left():
    text = str(jax.make_jaxpr(draw_at_once(init))(jax.random.key(0)))
    assert text.count("random_bits[") == 1
    assert "conv_general_dilated" not in text  # nor anything of the network's evaluation


def test_draws_in_loops_stay():
    def looped(key):
        body = lambda i, total: total + jax.random.normal(jax.random.fold_in(key, i), (3,))  # noqa: E731
        return jax.lax.fori_loop(0, 2, body, jnp.zeros(3)), nn.initializers.normal()(key, (4,))

    key = jax.random.key(1)
    first, second = map(np.asarray, draw_at_once(looped)(key))
    np.testing.assert_allclose(first, looped(key)[0], rtol=1e-6)
    assert second.shape == (4,) and np.ptp(second) > 0
