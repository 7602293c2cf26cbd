"""The DiT: published sizes, the forward pass against one in numpy, and its place where the UNet would be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdiff import startup
from jaxdiff.build import build_network
from jaxdiff.diffusion import make_schedule
from jaxdiff.errors import ConfigError
from jaxdiff.mesh import put_batch, to_host
from jaxdiff.models import DiT, UNet
from jaxdiff.models.dit import DITS, DiTBlock, stacked
from jaxdiff.models.layers import count_params
from jaxdiff.training.flops import count_flops
from jaxdiff.training.objectives import Recipe, diffusion_objective
from jaxdiff.training.step import make_init, make_train_step
from tests.test_autoguidance import save

KEY = jax.random.key(0, impl="rbg")  # compiles faster than threefry
SMALL = dict(patch=2, width=16, depth=2, num_heads=4)
MODEL = DiT(3, **SMALL, num_classes=4, dropout=0.5)


@pytest.mark.parametrize(
    ("name", "count", "millions"),
    [
        ("dit_s2", 32_865_056, 33),
        ("dit_b2", 130_315_808, 130),
        ("dit_l2", 457_840_672, 458),
        ("dit_xl2", 674_834_720, 675),
    ],
)
def test_parameter_counts(name, count, millions):
    """On latents of 32x32x4, with learnt variance and 1000 classes; the position embedding, which is counted with the
    parameters there, is none here."""
    model = DiT(8, **DITS[name], num_classes=1000)
    x, t = jnp.zeros((1, 32, 32, 4)), jnp.zeros((1,), jnp.int32)
    assert count_params(jax.eval_shape(model.init, KEY, x, t, t)) == count
    assert (count + 16 * 16 * model.width) / 1e6 == pytest.approx(millions, abs=0.6)


def random_params(model, *inputs):
    """Without the zeros of the initialisation, which hide the inputs from the output."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, KEY, *inputs)
    return jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def small():
    """Of another height than width, so that rows and columns are not mistaken for each other."""
    x = np.random.default_rng(1).standard_normal((2, 4, 8, 3)).astype(np.float32)
    inputs = x, jnp.array([3, 40]), jnp.array([0, 4])
    return jax.jit(MODEL.apply), random_params(MODEL, *inputs), inputs


@pytest.fixture(scope="module")
def new(small):
    """Parameters as they are initialised."""
    return to_host(jax.jit(MODEL.init)(KEY, *small[2]))


def by_hand(params, x, t, y, patch, heads):
    """The network in numpy and float64: sections 3.1 and 3.2 of the paper, a patch, a head and a block at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])

    def dense(a, layer):
        return a @ layer["kernel"] + layer["bias"]

    def silu(a):
        return a / (1 + np.exp(-a))

    def gelu(a):
        return 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))

    def norm(a, shift, scale):
        a = a - a.mean(-1, keepdims=True)
        a = a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6)
        return a * (1 + scale[:, None]) + shift[:, None]

    def rms(a, layer):
        return a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-6) * layer["scale"]

    def attention(qkv, width, block):
        size, out = width // heads, []
        for k in range(heads):
            q, k, v = (qkv[..., i * width + k * size : i * width + (k + 1) * size] for i in range(3))
            if "norm_q" in block:
                q, k = rms(q, block["norm_q"]), rms(k, block["norm_k"])
            weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(size))
            out.append(weights / weights.sum(-1, keepdims=True) @ v)
        return np.concatenate(out, -1)

    angles = np.outer(t, 10_000.0 ** (-np.arange(128) / 128))
    emb = dense(np.concatenate([np.cos(angles), np.sin(angles)], 1), p["time_0"])
    emb = silu(dense(silu(emb), p["time_1"]) + p["class_emb"]["embedding"][np.asarray(y)])

    width = emb.shape[1]
    freqs = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    tokens, grid = [], [(r, c) for r in range(x.shape[1] // patch) for c in range(x.shape[2] // patch)]
    for r, c in grid:
        piece = x[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].reshape(len(x), -1)
        place = np.concatenate([np.sin(c * freqs), np.cos(c * freqs), np.sin(r * freqs), np.cos(r * freqs)])
        tokens.append(piece @ p["patch"]["kernel"].reshape(-1, width) + p["patch"]["bias"] + place)
    h = np.stack(tokens, 1)

    for i in range(len(p["blocks"]["qkv"]["bias"])):
        block = jax.tree.map(lambda a: a[i], p["blocks"])  # noqa: B023
        shift, scale, gate, shift2, scale2, gate2 = np.split(dense(emb, block["modulation"]), 6, axis=1)
        a = attention(dense(norm(h, shift, scale), block["qkv"]), width, block)
        h = h + gate[:, None] * dense(a, block["proj"])
        a = gelu(dense(norm(h, shift2, scale2), block["mlp_in"]))
        h = h + gate2[:, None] * dense(a, block["mlp_out"])

    h = dense(norm(h, *np.split(dense(emb, p["modulation_out"]), 2, axis=1)), p["out"])
    out = np.empty((*x.shape[:3], h.shape[-1] // patch**2))
    for k, (r, c) in enumerate(grid):
        pixels = h[:, k].reshape(len(x), patch, patch, -1)
        out[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = pixels
    return out


@pytest.mark.parametrize("variant", [{}, {"qk_norm": True, "attention_chunk": 3, "remat": "blocks"}])
def test_computes_what_the_paper_says(small, variant):
    apply, params, inputs = small
    if variant:
        model = MODEL.clone(**variant)
        apply, params = jax.jit(model.apply), random_params(model, *inputs)
    out, expected = apply(params, *inputs), by_hand(params, *inputs, patch=2, heads=4)
    assert out.shape == (2, 4, 8, 3) and out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())


def test_uses_every_input(small):
    apply, params, (x, t, y) = small
    out = apply(params, x, t, y)
    for changed in [(x * 0.5, t, y), (x, t + 50, y), (x, t, (y + 1) % 5), (x[:, :, ::-1], t, y)]:
        assert (jnp.abs(apply(params, *changed) - out).max(axis=(1, 2, 3)) > 1e-3).all()
    one = apply(params, x[:1].repeat(2, 0), t[:1].repeat(2), y[:1].repeat(2))
    np.testing.assert_allclose(one[1], out[0], atol=1e-5)  # samples of a batch do not mix


def test_bfloat16_stays_near_float32(small):
    apply, params, inputs = small
    half = MODEL.clone(dtype=jnp.bfloat16)
    out, exact = jax.jit(half.apply)(params, *inputs), apply(params, *inputs)
    assert out.dtype == jnp.float32
    error = jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)
    assert 0 < error < 0.03


def test_a_new_one_predicts_zero_and_its_blocks_are_not_alike(small, new):
    apply, _, inputs = small
    assert (apply(new, *inputs) == 0).all()
    blocks = new["params"]["blocks"]
    assert (blocks["modulation"]["kernel"] == 0).all()
    for name in ("qkv", "proj", "mlp_in", "mlp_out"):
        assert (blocks[name]["kernel"][0] != blocks[name]["kernel"][1]).all()
    unconditional = jax.eval_shape(DiT(3, **SMALL).init, KEY, *inputs[:2])["params"]
    assert new["params"].keys() - unconditional.keys() == {"class_emb"}


def test_every_block_drops_other_numbers():
    """Blocks that add 2 or, where that is dropped, 0: two with the same mask would never add 2 in all."""
    c = 8
    blocks = stacked(DiTBlock, 2)(1, jnp.float32, 0.5, deterministic=False)
    h, emb = jnp.zeros((1, 64, c)), jnp.zeros((1, c))
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), jax.eval_shape(blocks.init, KEY, h, emb))
    inner = params["params"]
    inner["modulation"]["bias"][:, 5 * c :] = 1  # the gate of the perceptron
    inner["mlp_in"]["bias"][:] = 10  # of which GELU is 10
    inner["mlp_out"]["kernel"][:, :c] = np.eye(c) / 10
    out, _ = blocks.apply(params, h, emb, rngs={"dropout": KEY})
    assert np.unique(np.round(out, 3)).tolist() == [0, 2, 4]


def test_operations_are_those_of_all_blocks_and_the_program_of_one():
    batch, tokens, c, patch = 3, 16, 32, 4

    def flops(depth):
        model = DiT(8, patch, c, depth, 2, num_classes=10)
        x, label = jnp.zeros((batch, 16, 16, 4)), jnp.zeros((batch,), jnp.int32)
        params = jax.eval_shape(model.init, KEY, x, label, label)

        def total(params):
            return model.apply(params, x, label, label).sum()

        lines = str(jax.make_jaxpr(total)(params)).count("\n")
        return count_flops(total, params), count_flops(jax.value_and_grad(total), params), lines

    found = {depth: flops(depth) for depth in (1, 5)}
    for depth, (count, with_gradient, lines) in found.items():
        block = 6 * c**2 + tokens * (3 + 1 + 4 + 4) * c**2 + 2 * tokens**2 * c
        ends = c**2 + 2 * c**2 + tokens * c * patch**2 * 8  # the second layer of the timestep, the last modulation, out
        first = 256 * c + tokens * c * patch**2 * 4  # of which nobody asks for the gradient of the inputs
        assert count == 2 * batch * (first + depth * block + ends)
        assert with_gradient == 2 * batch * (2 * first + 3 * (depth * block + ends))
        assert lines == found[1][2]


@pytest.mark.parametrize(("remat", "most"), [("none", 25), ("dots", 15), ("blocks", 3)])
def test_what_is_kept_for_the_backward_pass(remat, most):
    """In bfloat16, in numbers a channel of a token and block: inputs of its products and of norms, gates and GELU,
    no more, and with `remat` less."""
    tokens, c, depth = 16, 64, 3
    model = DiT(3, 2, c, depth, 1, dtype=jnp.bfloat16, remat=remat)

    def kept(batch):
        x, t = jnp.zeros((batch, 8, 8, 3)), jnp.zeros((batch,))
        params = jax.eval_shape(model.init, KEY, x, t)
        _, pull = jax.eval_shape(lambda params: jax.vjp(lambda p: model.apply(p, x, t), params), params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    numbers = (kept(3) - kept(2)) / 2 / (depth * tokens * c)
    assert numbers < most


def test_training_reaches_every_parameter(small, new):
    """Within four steps: at first all but the last layer is behind zeros."""
    optimizer = optax.adam(1e-2)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    objective = diffusion_objective(
        MODEL.clone(dropout=0.0), make_schedule("linear"), Recipe(label_dropout=0.1), null_label=4
    )
    step = make_train_step(objective, optimizer, lambda n: 1e-2, mesh, seed=0, ema_decay=0.9)
    state = make_init(lambda key: new, optimizer, mesh)(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (8, 4, 8, 3), np.uint8), "label": np.arange(8, dtype=np.int32) % 4}
    losses = []
    for _ in range(4):
        state, metrics = step(state, put_batch(batch, mesh), ())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(to_host(state.opt_state[0].nu)):
        for part in leaf if "blocks" in str(path) else [leaf]:
            assert (part > 0).any(), path


def test_in_place_of_the_unet(tiny, tmp_path, monkeypatch):
    """Sampled from, guided by another checkpoint, and not exported."""
    monkeypatch.setitem(DITS, "dit_s2", SMALL)
    config = tiny("ddpm")
    assert isinstance(build_network(config, 3, 4), UNet)
    config.model.update(name="dit_s2", dropout=0.1)
    model = build_network(config, 3, 4)
    assert model == DiT(3, **SMALL, num_classes=4, dropout=0.1)
    x, t = np.zeros((1, 8, 8, 3), np.float32), np.zeros(1, np.int32)
    run, meta = tmp_path / "run", {"class_names": ["cat", "dog", "cow", "owl"], "shape": [8, 8, 3]}
    save(config, run, random_params(model, x, t, t), meta, steps=(1, 2))
    settings = {"num": 8, "guidance": 1.0, "steps": 2, "autoguidance": str(run), "autoguidance_step": 1}
    startup.sample(run, None, {f"sample.{name}": value for name, value in settings.items()}, None)
    (file,) = (run / "samples").glob("*-auto1-*.npz")
    assert np.load(file)["arr_0"].std() > 10
    with pytest.raises(ConfigError, match="config.model.name = 'dit_s2': must be 'unet' to export"):
        startup.export_model(run, tmp_path / "out", None, {}, None)
    assert not (tmp_path / "out").exists()
