"""Variants of attention, and of what the UNet keeps in memory: the same values from less, or what they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.models import UNet
from jaxdiff.models.attention import Attention, attend
from jaxdiff.models.norm import BiasAdded, add_bias
from jaxdiff.models.unet import REMAT
from jaxdiff.training.flops import jaxpr_flops

KEY = jax.random.key(0, impl="rbg")  # compiles faster than threefry


def draws(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def randomised(model, *inputs):
    """Parameters without the zeros of the initialisation, which hide the blocks from the output."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, KEY, *inputs))
    return jax.tree.unflatten(tree, [0.3 * a for a in draws(*(leaf.shape for leaf in leaves))])


def temporary(compiled):
    """Bytes that a program takes besides its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def attended(chunk, out, q, k, v):
    """Attention and its gradients."""
    value, pull = jax.vjp(lambda *args: attend(*args, chunk), q, k, v)
    return value, pull(out)


def test_chunks_compute_what_attention_is_in_the_memory_of_a_chunk():
    """Of 500 queries, which the chunk does not divide, over keys that are more."""
    q, k, v, out = draws((1, 500, 2, 8), (1, 512, 2, 8), (1, 512, 2, 8), (1, 500, 2, 8))
    plain, chunked = (jax.jit(attended, static_argnums=0).lower(chunk, out, q, k, v).compile() for chunk in (0, 32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain(out, q, k, v), chunked(out, q, k, v))
    weights = 2 * 500 * 512 * 4
    assert temporary(plain) > 2 * weights and temporary(chunked) < 0.6 * weights


def test_chunks_are_taken_where_they_save_memory():
    def is_chunked(n, m, chunk):
        q, k = (jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32) for length in (n, m))
        return "scan" in str(jax.make_jaxpr(lambda q, k: attend(q, k, k, chunk))(q, k))

    assert is_chunked(32, 32, 8) and is_chunked(32, 9, 31)
    assert not (is_chunked(32, 32, 0) or is_chunked(32, 32, 32) or is_chunked(32, 8, 4))


GLOBAL = dict(channels=16, channel_mult=(1,), num_res_blocks=0, attention_resolutions=(32,), head_dim=16, dropout=0.5)
GLOBAL |= {"mid_attention": False, "attention_chunk": 16}
# On a CPU XLA removes the barriers around what is computed again, and then computes it once; on a GPU it does not.
AS_ON_GPU = {"xla_disable_hlo_passes": "cse_barrier_expander"}


@pytest.fixture(scope="module")
def programs():
    """Value and gradients of a UNet that attends over all 32 x 32 pixels: what they are, need and count, by `remat`."""
    x, target = draws((1, 32, 32, 3), (1, 32, 32, 3))
    t = jnp.array([500])
    params = randomised(UNet(3, **GLOBAL, remat="blocks"), x, t)  # which has the names of all
    found = {}
    for remat in REMAT:
        model = UNet(3, **GLOBAL, remat=remat)

        def loss(params, model=model):
            return (target * model.apply(params, x, t, None, False, rngs={"dropout": KEY})).mean()

        traced = jax.jit(jax.value_and_grad(loss)).trace(params)
        program = traced.lower().compile(AS_ON_GPU)
        found[remat] = program(params), temporary(program), jaxpr_flops(traced.jaxpr)
    return found


def test_attention_over_all_pixels_takes_less_than_their_squares(programs):
    _, memory, _ = programs["none"]
    assert memory < 4 * (32 * 32) ** 2


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_the_same_network_in_less_memory(programs, remat):
    """The same parameters, dropout, values, gradients and count of operations."""
    (plain, memory, count), (values, less, own_count) = programs["none"], programs[remat]
    assert own_count == count
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7, rtol=1e-4), plain, values)
    assert less < 0.6 * memory
    assert programs["blocks"][1] < programs["dots"][1]


LEVELS = dict(channels=8, channel_mult=(1, 2), num_res_blocks=0, attention_resolutions=(), resblock_updown=False)
LEVELS |= {"mid_attention": False}


def test_attention_across_levels():
    plain, across = UNet(3, **LEVELS), UNet(3, **LEVELS, cross_resolution=(8,), head_dim=8)
    (x,) = draws((2, 8, 8, 3))
    t = jnp.array([3, 900])
    params = randomised(across, x, t)["params"]
    added = params.keys() - jax.eval_shape(plain.init, KEY, x, t)["params"].keys()
    assert added == {"up0_levels", "level0_tokens", "level1_tokens"}

    @jax.jit
    def apply(params):
        captured = across.apply({"params": params}, x, t, capture_intermediates=True)[1]["intermediates"]
        found = {name: captured[name]["__call__"][0] for name in added | {"conv_in", "down0_resample", "up0_res0"}}
        found |= {"conv_in": add_bias(*found["conv_in"][:2]), "up0_res0": found["up0_res0"][0]}
        return {name: out.x if isinstance(out, BiasAdded) else out for name, out in found.items()}

    seen = jax.tree.map(np.asarray, apply(params))
    pooled = seen["conv_in"].reshape(2, 4, 2, 4, 2, 8).mean(axis=(2, 4)).reshape(2, 16, 8)
    for maps, level in ((pooled, "level0_tokens"), (seen["down0_resample"].reshape(2, 16, 8), "level1_tokens")):
        expected = maps @ params[level]["kernel"] + params[level]["bias"]
        np.testing.assert_allclose(seen[level], expected, atol=1e-5)

    proj = jax.tree.map(np.zeros_like, params["up0_levels"]["proj"])  # as it is initialised
    new = params | {"up0_levels": params["up0_levels"] | {"proj": proj}}
    assert (apply(new)["up0_levels"] == seen["up0_res0"]).all()
    for level in ("level0_tokens", "level1_tokens"):  # it depends on both
        other = params | {level: {**params[level], "kernel": -params[level]["kernel"]}}
        change = jnp.abs(apply(other)["up0_levels"] - seen["up0_levels"])
        assert (change.max(axis=(1, 2, 3)) > 1e-3).all()


def test_normalised_queries_and_keys():
    """How large they are is the learnt scale's to say, not that of the kernel that they come from."""
    (x,) = draws((2, 4, 4, 16))
    block = Attention(8, jnp.float32, qk_norm=True)
    params = randomised(block, x)["params"]
    assert params["norm_q"]["scale"].shape == params["norm_k"]["scale"].shape == (8,)

    @jax.jit
    def apply(params):
        out, captured = block.apply({"params": params}, x, capture_intermediates=True)
        return out.x, [captured["intermediates"][name]["__call__"][0] for name in ("norm_q", "norm_k")]

    out, normed = jax.tree.map(np.asarray, apply(params))
    for name, values in zip(("norm_q", "norm_k"), normed, strict=True):
        np.testing.assert_allclose(((values / params[name]["scale"]) ** 2).mean(axis=-1), 1, rtol=1e-3)
    louder = params | {"qkv": jax.tree.map(lambda a: a * np.repeat([30, 30, 1], 16).astype(np.float32), params["qkv"])}
    np.testing.assert_allclose(apply(louder)[0], out, atol=1e-4)
    sharper = params | {"norm_q": {"scale": 10 * params["norm_q"]["scale"]}}
    assert jnp.abs(apply(sharper)[0] - out).max() > 1e-3
    half = jax.eval_shape(Attention(8, jnp.bfloat16, qk_norm=True).apply, {"params": params}, x.astype(jnp.bfloat16))
    assert half.x.dtype == jnp.bfloat16
