"""diffusers' AutoencoderKL: what it computes, read and written without losing a bit, and what is refused."""

import json

import jax
import numpy as np
import pytest
from safetensors.flax import save_file as save_bfloat16
from safetensors.numpy import load_file, save_file

from jaxdiff import mesh as meshes
from jaxdiff import startup
from jaxdiff.data.latents import params_hash
from jaxdiff.errors import ConfigError
from jaxdiff.interop.diffusers import WEIGHTS, load_autoencoder, save_autoencoder
from jaxdiff.keys import named_key
from jaxdiff.models import AutoencoderKL
from jaxdiff.training import stages
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.optimizer import lr_schedule, make_optimizer
from jaxdiff.training.stages import run_train
from jaxdiff.training.step import make_init
from tests.interop.golden import CONFIGS, PATH, weights

GOLDEN = dict(np.load(PATH))


def folder_of(name, root, tensors=None, **changes):
    """A folder as diffusers writes it, of the recorded autoencoder `name`."""
    root.mkdir(exist_ok=True)
    config = {"_class_name": "AutoencoderKL", **json.loads(str(GOLDEN[f"{name}/config"])), **changes}
    (root / "config.json").write_text(json.dumps(config))
    save_file(tensors_of(name) if tensors is None else tensors, root / WEIGHTS)
    return root


def tensors_of(name):
    return weights(json.loads(str(GOLDEN[f"{name}/shapes"])))


@pytest.mark.parametrize("name", CONFIGS)
def test_computes_what_diffusers_computes(name, tmp_path):
    fields, params = load_autoencoder(folder_of(name, tmp_path))
    model = AutoencoderKL(**fields)
    with jax.default_matmul_precision("highest"):
        posterior = model.apply(params, GOLDEN["image"], method="encode")
        decoded = model.apply(params, GOLDEN[f"{name}/mean"], method="decode")
    found = {"mean": posterior.mean, "logvar": posterior.logvar, "decoded": decoded}
    for what, value in found.items():
        np.testing.assert_allclose(value, GOLDEN[f"{name}/{what}"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name, tmp_path):
    fields, params = load_autoencoder(folder_of(name, tmp_path / "in"))
    save_autoencoder(AutoencoderKL(**fields), params, 32, tmp_path / "out")
    before, after = tensors_of(name), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    written, theirs = (
        json.loads((tmp_path / "out" / "config.json").read_text()),
        json.loads(str(GOLDEN[f"{name}/config"])),
    )
    assert {key: theirs.get(key, value) for key, value in written.items()} == written
    with pytest.raises(ConfigError, match="out: exists and is not empty"):
        save_autoencoder(AutoencoderKL(**fields), params, 32, tmp_path / "out")


def test_groups_that_diffusers_does_not_have(tmp_path):
    with pytest.raises(ConfigError, match="norm_groups = 32: .* do not divide the channels 16, 32;"):
        save_autoencoder(AutoencoderKL(3, 16, (1, 2)), {}, 32, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_of_old_files(tmp_path):
    """Attention as 1x1 convolutions called query, key, value and proj_attn."""
    old = {}
    for name, value in tensors_of("f4").items():
        if ".attentions." in name and "group_norm" not in name:
            value = value[..., None, None] if value.ndim == 2 else value
            for new, word in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                name = name.replace(new, word)
        old[name] = value
    assert sum("proj_attn" in name for name in old) == 4
    _, expected = load_autoencoder(folder_of("f4", tmp_path / "new"))
    _, params = load_autoencoder(folder_of("f4", tmp_path / "old", old))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, expected))


def test_half_precision(tmp_path):
    folder = folder_of("f4", tmp_path)
    half = {name: jax.numpy.asarray(value, jax.numpy.bfloat16) for name, value in tensors_of("f4").items()}
    save_bfloat16(half, folder / WEIGHTS)
    _, params = load_autoencoder(folder)
    kernel, name = params["params"]["encoder"]["conv_in"]["kernel"], "encoder.conv_in.weight"
    assert kernel.dtype == np.float32 and (kernel == np.float32(half[name]).transpose(2, 3, 1, 0)).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "UNet2DModel"}, ["'UNet2DModel'", "'AutoencoderKL'"]),
        ({"act_fn": "relu"}, ["act_fn = 'relu'", "'silu'"]),
        ({"use_quant_conv": False}, ["use_quant_conv = False"]),
        ({"block_out_channels": [16, 24, 64]}, ["block_out_channels"]),
        ({"block_out_channels": []}, ["must give block_out_channels"]),
        ({"layers_per_block": None}, ["must give layers_per_block"]),
        ({"down_block_types": ["DownEncoderBlock2D", "KDownBlock2D"]}, ["KDownBlock2D"]),
        ({"down_block_types": [*["DownEncoderBlock2D"] * 2, "AttnDownEncoderBlock2D"]}, ["at the same levels"]),
    ],
)
def test_options_that_we_do_not_have(tmp_path, change, words):
    with pytest.raises(ConfigError) as error:
        load_autoencoder(folder_of("f4", tmp_path, **change))
    assert all(word in str(error.value) for word in words)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = tensors_of("f4")
    lacking = {name: value for name, value in tensors.items() if not name.startswith("quant_conv.")}
    with pytest.raises(ConfigError, match="misses quant_conv.bias, quant_conv.weight$"):
        load_autoencoder(folder_of("f4", tmp_path, lacking))
    with pytest.raises(ConfigError, match="has besides a, logit_scale$"):
        load_autoencoder(folder_of("f4", tmp_path, {**tensors, "logit_scale": np.zeros(1), "a": np.zeros(1)}))
    wrong = {**tensors, "encoder.conv_in.weight": np.zeros((16, 4, 3, 3), np.float32)}
    with pytest.raises(ConfigError, match=r"shape of encoder.conv_in.weight \[16, 4, 3, 3\], not \[16, 3, 3, 3\]$"):
        load_autoencoder(folder_of("f4", tmp_path, wrong))


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="config.json"):
        load_autoencoder(tmp_path)
    folder = folder_of("f4", tmp_path)
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="damaged"):
        load_autoencoder(folder)
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")  # a pickle: never read
    with pytest.raises(ConfigError, match="there is no file"):
        load_autoencoder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json"):
        load_autoencoder(folder)


def interrupted(*_):
    raise KeyboardInterrupt


def test_import_encode_and_export(tiny, tmp_path, monkeypatch):
    """The workdir holds the imported weights, encodes with them, can be trained on, and is exported."""
    source = folder_of("f4", tmp_path / "in")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # which leaves nothing to go on from
        patch.setattr(stages, "autoencoder_experiment", interrupted)
        startup.import_model(tiny("vae"), tmp_path / "run", source, {})
    startup.import_model(tiny("vae"), tmp_path / "run", source, {})
    startup.export_model(tmp_path / "run", tmp_path / "out", None, {}, None)
    before, after = tensors_of("f4"), load_file(tmp_path / "out" / WEIGHTS)
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    with pytest.raises(ConfigError, match="run: exists and is not empty"):
        startup.import_model(tiny("vae"), tmp_path / "run", source, {})

    fields, params = load_autoencoder(source)
    ldm = tiny("ldm")
    ldm.autoencoder.update(fields)
    ldm.autoencoder.path = str(tmp_path / "run")
    startup.encode(ldm, tmp_path / "ldm")
    (path,) = (tmp_path / "run" / "latents").glob("*/manifest.json")
    manifest = json.loads(path.read_text())
    assert manifest["settings"]["autoencoder"] == params_hash(params) and not (tmp_path / "ldm").exists()
    assert sum(shard["rows"] for shard in manifest["shards"]["train"]) == 1500

    vae = tiny("vae")
    vae.autoencoder.update(fields)
    vae.steps = 2
    with pytest.raises(ConfigError, match="config.steps = 2"):
        run_train(vae, tmp_path / "run")
    # What training restores, without the minute of compiling it.
    optimizer = make_optimizer(lr_schedule(1.0, 2), vae.weight_decay, vae.clip_norm)
    abstract = jax.eval_shape(
        lambda: make_init(lambda key: params, optimizer, meshes.make_mesh())(named_key(0, "init"))
    )
    sharding = meshes.replicated(meshes.make_mesh())
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), abstract)
    state, meta = Checkpoints(tmp_path / "run").restore(abstract)
    assert state.step == 0 and meta["data"] == {"batches": 0, "images": 1500} and len(meta["class_names"]) == 10
    for tree in (state.params, state.ema):
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), tree, params))
    with pytest.raises(ConfigError, match="--step=7: .* has steps 0"):
        startup.export_model(tmp_path / "run", tmp_path / "later", None, {}, 7)


def test_only_what_there_is(tiny, tmp_path):
    folder_of("f4", tmp_path / "in")
    with pytest.raises(ConfigError, match="config.autoencoder.channels = 8: must be 16, as in .*in, or left out"):
        startup.import_model(tiny("vae"), tmp_path / "run", tmp_path / "in", {"autoencoder.channels": 8})
    with pytest.raises(ConfigError, match="run: no config.json there"):
        startup.export_model(tmp_path / "run", tmp_path / "out", None, {}, None)
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()
