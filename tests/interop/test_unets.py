"""UNets of diffusers and ADM: what they compute, read and written without losing a bit, and what is refused."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import ddpm
from jaxdiff import startup
from jaxdiff.build import build_autoencoder, build_network
from jaxdiff.data.latents import Whitening
from jaxdiff.errors import ConfigError
from jaxdiff.interop import adm
from jaxdiff.interop.diffusers import WEIGHTS, autoencoder_names, model_names
from jaxdiff.interop.importing import import_unet, read_unet
from jaxdiff.interop.pipeline import save_pipeline, scheduler_config
from jaxdiff.interop.tensors import import_params
from jaxdiff.interop.unet2d import unet_config, unet_tensors
from jaxdiff.models import AutoencoderKL, UNet
from jaxdiff.training.stages import run_train
from tests.interop.golden import UNET_PATH, UNETS, weights
from tests.interop.shapes import shapes_of

GOLDEN = dict(np.load(UNET_PATH))
ADM = UNET_PATH.parent / "adm_unet"


def tensors_of(name):
    return weights(json.loads(str(GOLDEN[f"{name}/shapes"])))


def folder_of(name, root, **changes):
    """A folder as diffusers writes it, of the recorded UNet `name`."""
    root.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "UNet2DModel", **json.loads(str(GOLDEN[f"{name}/config"])), **changes}
    (root / "config.json").write_text(json.dumps(config))
    save_file(tensors_of(name), root / WEIGHTS)
    return root


def adm_folder(root, tensors=None, **changes):
    """The recorded folder of ADM, with these changes."""
    root.mkdir(parents=True, exist_ok=True)
    config = {**json.loads((ADM / "config.json").read_text()), **changes}
    (root / "config.json").write_text(json.dumps(config))
    save_file(load_file(ADM / adm.WEIGHTS) if tensors is None else tensors, root / adm.WEIGHTS)
    return root


def load(folder, num_classes=10):
    """The network and parameters of a folder, for images of 16 pixels."""
    foreign = read_unet(folder, (16, 16, 3), num_classes)
    config = ddpm.get_config("digits")
    config.update_from_flattened_dict(foreign.fields)
    model = build_network(config, 3, num_classes)
    return model, import_unet(foreign, model, (16, 16, 3), str(folder))


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes(), a, b))


@pytest.mark.parametrize("name", UNETS)
def test_computes_what_diffusers_computes_and_comes_back(name, tmp_path):
    model, params = load(folder_of(name, tmp_path / "in"))
    with jax.default_matmul_precision("highest"):
        out = jax.jit(model.apply)(params, GOLDEN["x"], GOLDEN["t"], GOLDEN["y"])
    np.testing.assert_allclose(out, GOLDEN[f"{name}/out"], atol=1e-4, rtol=1e-4)

    before, after = tensors_of(name), unet_tensors(model, params)
    theirs, config = json.loads(str(GOLDEN[f"{name}/config"])), unet_config(model, 3, 16)
    flipped = not theirs["flip_sin_to_cos"]
    assert before.keys() == after.keys()
    assert [key for key in before if not same(before[key], after[key])] == flipped * ["time_embedding.linear_1.weight"]
    changed = {key for key, value in config.items() if key in theirs and theirs[key] != value}
    unused = {"attn_norm_num_groups", "attention_head_dim"} | ({"flip_sin_to_cos"} if flipped else set())
    assert changed <= (unused if name != "adm" else set())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    save_file(after, tmp_path / "out" / WEIGHTS)
    again, params_again = load(tmp_path / "out")
    assert again == model and same(params_again, params)


@pytest.mark.parametrize("new_order", [False, True])
def test_computes_what_adm_computes(new_order, tmp_path):
    """Both orders of queries, keys and values; in the newer one the recorded weights are put by hand."""
    tensors = load_file(ADM / adm.WEIGHTS)
    if new_order:
        for name in [name for name in tensors if ".qkv." in name]:
            rows = np.arange(192).reshape(4, 3, 16)  # head, one of q, k and v, channel
            order = np.concatenate([rows[:, i].ravel() for i in range(3)])
            tensors[name] = np.ascontiguousarray(tensors[name][order])
    model, params = load(adm_folder(tmp_path, tensors, use_new_attention_order=new_order))
    io = np.load(ADM / "io.npz")
    with jax.default_matmul_precision("highest"):
        out = jax.jit(model.apply)(params, io["x"], io["t"], io["y"])
    assert out.shape == (3, 16, 16, 6)  # eps, and what says the variance
    np.testing.assert_allclose(out, io["out"], atol=1e-4, rtol=1e-4)


def test_heads_by_number_are_those_by_channels(tmp_path):
    """4 heads of the 64 channels that the recorded network attends over."""
    model, params = load(adm_folder(tmp_path, num_head_channels=-1, num_heads=4))
    other, expected = load(ADM)
    assert (model.num_heads, other.num_heads, other.head_dim) == (4, 0, 16)
    assert same(params, expected)
    assert not model.qk_norm and model.cross_resolution == ()  # whatever the config says that it is imported with
    config = unet_config(model.clone(out_channels=3), 3, 16)
    assert config["attention_head_dim"] == 16


def test_convolutions_that_resample_as_adm_calls_them():
    names = adm.unet_names(2, 1, [False, True])
    paths = ["down0_resample/conv/kernel", "up1_resample/conv/bias", "down1_res0/emb/kernel", "up0_res1/skip/kernel"]
    assert [names(f"params/{path}") for path in paths] == [
        ["input_blocks.2.0.op.weight"],
        ["output_blocks.1.2.conv.bias"],
        ["input_blocks.3.0.emb_layers.1.weight"],
        ["output_blocks.3.0.skip_connection.weight"],
    ]
    assert adm.unet_names(2, 1, [True, False])("params/up1_resample/conv/bias") == ["output_blocks.1.1.conv.bias"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "AutoencoderKL"}, ["'AutoencoderKL'", "'UNet2DModel'"]),
        ({"act_fn": "gelu"}, ["act_fn = 'gelu'", "'silu'"]),
        ({"time_embedding_type": "fourier"}, ["time_embedding_type = 'fourier'"]),
        ({"class_embed_type": "timestep"}, ["class_embed_type = 'timestep'"]),
        ({"center_input_sample": True}, ["center_input_sample = True"]),
        ({"resnet_time_scale_shift": "spatial"}, ["resnet_time_scale_shift = 'spatial'"]),
        ({"resnet_time_scale_shift": "scale_shift"}, ["attn_norm_num_groups = None", "only 8"]),
        ({"in_channels": 4}, ["in_channels = 4"]),
        ({"out_channels": 6}, ["out_channels = 6"]),
        ({"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, ["down_block_types", "SkipDownBlock2D"]),
        ({"down_block_types": ["DownBlock2D"]}, ["down_block_types = ['DownBlock2D']", "as many"]),
        ({"down_block_types": ["DownBlock2D", "DownBlock2D"]}, ["up_block_types = ", "attention at other levels"]),
        ({"upsample_type": "resnet"}, ["up_block_types = ", "other resampling"]),
        ({"block_out_channels": None}, ["must give block_out_channels"]),
        ({"num_class_embeds": 1000}, ["num_class_embeds = 1000: must be 10 or, with a null class, 11"]),
    ],
)
def test_options_of_diffusers_that_we_do_not_have(tmp_path, change, words):
    with pytest.raises(ConfigError) as error:
        read_unet(folder_of("classes", tmp_path, **change), (16, 16, 3), 10)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv_resample": False}, ["conv_resample = False"]),
        ({"dims": 3}, ["dims = 3"]),
        ({"out_channels": 4}, ["out_channels = 4", "3 or 6"]),
        ({"num_classes": 100}, ["num_classes = 100: must be 10"]),
        (
            {"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4},
            ["num_heads_upsample = 4", "num_heads = 2"],
        ),
        ({"channel_mult": None}, ["must give channel_mult"]),
        ({"attention_resolutions": None}, ["attention_resolutions = None: must be a list"]),
        ({"attention_resolutions": "16,8"}, ["attention_resolutions = '16,8': must be a list"]),
    ],
)
def test_options_of_adm_that_we_do_not_have(tmp_path, change, words):
    with pytest.raises(ConfigError) as error:
        read_unet(adm_folder(tmp_path, **change), (16, 16, 3), 10)
    assert all(word in str(error.value) for word in words), error.value


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = load_file(ADM / adm.WEIGHTS)
    tensors["out.3.weight"] = tensors.pop("out.2.weight")
    with pytest.raises(ConfigError, match="it misses out.2.weight$"):
        load(adm_folder(tmp_path, tensors))
    wrong = {**load_file(ADM / adm.WEIGHTS), "middle_block.1.qkv.bias": np.zeros(100, np.float32)}
    with pytest.raises(ConfigError, match=r"shape of middle_block.1.qkv.bias \[100\], not \[192\]$"):
        load(adm_folder(tmp_path, wrong))
    (tmp_path / adm.WEIGHTS).rename(tmp_path / "model.pt")  # a pickle: never read
    with pytest.raises(ConfigError, match="UNet2DModel"):
        load(tmp_path)


FIELDS = dict(channels=16, channel_mult=(1, 2), attention_resolutions=(8,), norm_groups=8, head_dim=8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"context_tokens": 4, "num_classes": 3}, "config.model.context_tokens = 4: .* no cross-attention"),
        ({"cross_resolution": (8,)}, r"config.model.cross_resolution = \(8,\): .* train with \(\) to export"),
        ({"qk_norm": True}, "config.model.qk_norm = True: .* train with False to export"),
        ({"out_channels": 6}, "config.model.learned_variance = True"),
        ({"norm_groups": 32}, "config.model.norm_groups = 32: .* do not divide the channels 16, 32;"),
        ({"num_heads": 2, "attention_resolutions": (16, 8)}, "config.model.num_heads = 2: .* over 16, 32 channels"),
    ],
)
def test_what_diffusers_cannot_express(tmp_path, fields, words):
    config = ddpm.get_config("digits")
    with pytest.raises(ConfigError, match=words):
        save_pipeline(config, UNet(**{"out_channels": 3, **FIELDS, **fields}), {}, (16, 16, 3), tmp_path / "out")
    config.sample.update(sampler="ddpm", spacing="linspace")
    with pytest.raises(ConfigError, match="config.sample.spacing = 'linspace': must be one of leading, trailing, adm"):
        save_pipeline(config, UNet(3, **FIELDS), {}, (16, 16, 3), tmp_path / "out")
    config.sample.update(sampler="ddpm_large", spacing="trailing")
    with pytest.raises(ConfigError, match="config.sample.spacing = 'trailing': must be one of leading, adm to export"):
        save_pipeline(config, UNet(3, **FIELDS), {}, (16, 16, 3), tmp_path / "out")
    config.sample.update(sampler="ddim", spacing="leading")
    for field, value in (("schedule", "flow"), ("prediction", "edm"), ("noise_shift", 2.0)):
        config = ddpm.get_config("digits")
        config.diffusion[field] = value
        with pytest.raises(ConfigError, match=f"config.diffusion.{field} = {value!r}: must be .* to export"):
            save_pipeline(config, UNet(3, **FIELDS), {}, (16, 16, 3), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_import_sample_train_and_export(tiny, tmp_path):
    """An unconditional pipeline becomes a workdir that is sampled, exported to the same bytes, and trained on."""
    one = {"block_out_channels": [16], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    source = tmp_path / "in"
    folder_of("without attention", source / "unet", **one)
    model = UNet(3, channels=16, channel_mult=(1,), num_res_blocks=1, **PLAIN)
    x = np.zeros((1, 8, 8, 3), np.float32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), x, np.zeros(1, np.int32))
    save_file(weights(shapes_of(abstract, model_names(1))), source / "unet" / WEIGHTS)
    config = tiny("ddpm")
    config.diffusion.update(beta_start=1e-4)
    (source / "scheduler").mkdir()
    (source / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler_config(config)))

    config = tiny("ddpm")
    config.eval.scores = ()
    config.update(steps=2)
    run = tmp_path / "run"
    for field, wrong, right in (
        ("sample.guidance", 1.0, "0.0"),
        ("model.qk_norm", True, "False"),
        ("model.name", "dit_s2", "'unet'"),
    ):
        with pytest.raises(ConfigError, match=f"config.{field} = {wrong!r}: must be {right}, as in .*in, or left out"):
            startup.import_model(config.copy_and_resolve_references(), run, source, {field: wrong})
    assert not run.exists()
    startup.import_model(config, run, source, {})
    assert config.diffusion.beta_start == 1e-4 and not config.model.conditional

    startup.sample(run, None, {"sample.num": 3, "sample.batch_size": 3}, None)
    (drawn,) = (run / "samples").glob("*.npz")
    images = np.load(drawn)
    assert images["arr_0"].shape == (3, 8, 8, 3) and "arr_1" not in images and np.ptp(images["arr_0"]) > 100

    startup.export_model(run, tmp_path / "out", None, {"sample.sampler": "ddim"}, None)
    before, after = (load_file(tmp_path / part / "unet" / WEIGHTS) for part in ("in", "out"))
    assert before.keys() == after.keys() and all(before[key].tobytes() == after[key].tobytes() for key in before)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "DDIMPipeline" and index["unet"] == ["diffusers", "UNet2DModel"]
    again = read_unet(tmp_path / "out", (8, 8, 3), 10)
    assert again.fields == read_unet(source, (8, 8, 3), 10).fields
    with pytest.raises(ConfigError, match="out: exists and is not empty"):
        startup.export_model(run, tmp_path / "out", None, {}, None)
    with pytest.raises(ConfigError, match="config.lr: cannot change in this --mode; only sample"):
        startup.export_model(run, tmp_path / "other", None, {"lr": 1.0}, None)

    assert run_train(config, run)["val_loss"] > 0
    assert {p.name for p in (run / "checkpoints").iterdir()} >= {"0", "2"}


def generated(model, *inputs):
    """Parameters that are functions of their diffusers names."""
    abstract = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    autoencoder = isinstance(model, AutoencoderKL)
    names = (autoencoder_names if autoencoder else model_names)(len(model.channel_mult))
    return import_params(weights(shapes_of(abstract, names)), abstract, names, "here")


def test_a_latent_pipeline_comes_back(tiny, tmp_path):
    """Exported with the whitening folded in, imported in two steps, exported again: the same bytes."""
    ldm = tiny("ldm")
    ldm.autoencoder.norm_groups = 8
    ldm.model.update(conditional=False, context_tokens=0, norm_groups=8)
    ldm.diffusion.label_dropout = ldm.sample.guidance = 0.0
    ldm.eval.scores = ()
    vae, unet = build_autoencoder(ldm), build_network(ldm, 2, 10)
    vae_params = generated(vae, np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 8, 8, 2), np.float32))
    unet_params = generated(unet, np.zeros((1, 8, 8, 2), np.float32), np.zeros(1, np.int32))
    out = tmp_path / "out"
    whitening = Whitening([0.5, -2.0], [0.25, 3.0])
    save_pipeline(ldm, unet, unet_params, (8, 8, 2), out, autoencoder=(vae, vae_params, whitening))
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "LDMPipeline" and index["vqvae"] == ["diffusers", "AutoencoderKL"]
    assert json.loads((out / "vqvae" / "config.json").read_text())["scaling_factor"] == 1.0

    stage1 = tiny("vae")
    startup.import_model(stage1, tmp_path / "vae", out / "vqvae", {})
    ldm.autoencoder.path = ""
    with pytest.raises(ConfigError, match="config.autoencoder.path = '': must be the autoencoder's workdir"):
        startup.import_model(ldm.copy_and_resolve_references(), tmp_path / "ldm", out, {})
    ldm.autoencoder.path = str(tmp_path / "vae")
    with pytest.raises(ConfigError, match="config.diffusion.scaling_factor = 0.0: must be positive"):
        startup.import_model(ldm.copy_and_resolve_references(), tmp_path / "ldm", out / "unet", {})
    startup.import_model(ldm, tmp_path / "ldm", out, {})
    assert ldm.diffusion.scaling_factor == 1.0
    startup.export_model(tmp_path / "ldm", tmp_path / "again", None, {}, None)
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert len(files) == 6
    assert all((out / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


PLAIN = dict(
    attention_resolutions=(), mid_attention=False, norm_groups=8, scale_shift_norm=False, resblock_updown=False
)


def test_a_network_of_adm_is_sampled_with_the_variance_it_learned(tiny, tmp_path):
    config = tiny("ddpm")
    config.data.image_size = 16
    startup.import_model(config, tmp_path / "run", pathlib.Path(shutil.copytree(ADM, tmp_path / "in")), {})
    assert config.model.learned_variance and not config.model.null_class and config.diffusion.label_dropout == 0
    assert config.diffusion.loss == "hybrid"  # with which it can be trained on
    with pytest.raises(ConfigError, match="config.model.learned_variance = True: must be False to export"):
        startup.export_model(tmp_path / "run", tmp_path / "out", None, {"sample.sampler": "ddim"}, None)
    with pytest.raises(ConfigError, match="config.sample.guidance = 1.0: must be 0 with model.null_class = False"):
        startup.sample(tmp_path / "run", None, {"sample.guidance": 1.0}, None)
    settings = {"sample.num": 2, "sample.batch_size": 2, "sample.steps": 2, "sample.spacing": "trailing"}
    for sampler in ("ddpm", "ddpm_large"):  # its own variance, and a fixed one
        startup.sample(tmp_path / "run", None, settings | {"sample.sampler": sampler}, None)
    one, other = (np.load(path)["arr_0"] for path in (tmp_path / "run" / "samples").glob("*.npz"))
    assert one.shape == (2, 16, 16, 3) and (one != other).any()
