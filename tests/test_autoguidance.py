"""--mode=sample with a weak model: what it computes, and workdirs that do not belong together."""

import json
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdiff import mesh as meshes
from jaxdiff.build import build_autoencoder
from jaxdiff.config import check, files
from jaxdiff.data.latents import Whitening
from jaxdiff.errors import ConfigError
from jaxdiff.generator import Decoder, Generator, Weak
from jaxdiff.sampling import load_weak, run_sample
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.stages import vae_config
from jaxdiff.training.step import TrainState

NAMES = ["cat", "dog", "cow", "owl"]
PIXELS = {"class_names": NAMES, "shape": [8, 8, 3]}
LATENTS = {
    "class_names": NAMES,
    "shape": [8, 8, 2],
    "whitening": {"mean": [0.5, 0.5], "std": [1.0, 1.0]},
    "autoencoder": "autoencoder",
}


def randomised(tree, seed):
    """Of the size of trained ones: the zeros of initialisation would make every prediction zero."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [rng.normal(0, 0.2, leaf.shape).astype(np.float32) for leaf in leaves])


def save(config, folder, params, meta, steps=(3,)):
    """A workdir as training leaves it; the raw parameters are half the averaged ones."""
    folder.mkdir()
    files.save(config, folder / "config.json")
    ema = meshes.put_replicated(params, meshes.make_mesh())
    raw = jax.tree.map(lambda x: x / 2, ema)
    checkpoints = Checkpoints(folder, keep=9)
    for step in steps:
        checkpoints.save(TrainState(np.int32(step), raw, ema, {"x": jax.tree.leaves(ema)[0]}), meta)
    checkpoints.close()


def unet_params(config, meta, seed):
    generator = Generator(config, meta["shape"], len(NAMES), meshes.make_mesh())
    return randomised(generator.abstract_params(), seed)


@pytest.fixture(scope="module")
def one_device():
    return jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def config(tiny):
    config = tiny("ddpm")
    config.model.update(channels=8, channel_mult=(1,), attention_resolutions=(), head_dim=8)
    config.diffusion.label_dropout = 0.0  # so that there is no other guidance
    config.sample.update(num=4, batch_size=8, steps=2, clip=False)
    return config


@pytest.fixture(scope="module")
def narrow(config):
    narrow = config.copy_and_resolve_references()
    narrow.model.update(channels=4, head_dim=4)
    return narrow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config, narrow):
    """Workdirs main (step 3), and weak (steps 1 and 3), of half its width."""
    folder = tmp_path_factory.mktemp("autoguidance")
    save(config, folder / "main", unet_params(config, PIXELS, 0), PIXELS)
    save(narrow, folder / "weak", unet_params(narrow, PIXELS, 1), PIXELS, steps=(1, 3))
    return folder


def test_images_are_main_plus_w_times_the_way_from_weak_to_main(folder, one_device, config, narrow):
    # One step of the "leading" timesteps, t = 0, where eps hardly moves x; the command line refuses that.
    one_step = ConfigDict({**config.sample.to_dict(), "steps": 1})

    def alone(config, seed):
        generator = Generator(config, (8, 8, 3), 4, one_device)
        return generator(unet_params(config, PIXELS, seed), one_step, np.arange(4)).astype(int)

    main, weak = alone(config, 0), alone(narrow, 1)
    config = ConfigDict(config.to_dict())
    settings = {"guidance": 2.0, "autoguidance": str(folder / "weak"), "autoguidance_step": 1}
    config.sample.update(settings)
    check.validate_sample(config)
    config.sample.steps = 1
    (sheet,) = run_sample(config, folder / "main", None)
    assert sheet.name == "step3-ema-ddim1-w2-auto1-seed0.png"
    assert json.loads(sheet.with_suffix(".json").read_text()).items() >= settings.items()
    with np.load(sheet.with_suffix(".npz")) as data:
        guided = data["arr_0"].astype(int)
    inside = (np.minimum(np.minimum(main, weak), guided) > 0) & (np.maximum(np.maximum(main, weak), guided) < 255)
    assert inside.mean() > 0.3 and (main != weak).any()
    assert np.abs(3 * main - 2 * weak - guided)[inside].max() <= 4


def test_interval_rescale_and_other_weak_parameters(one_device, config, narrow):
    """One program for all weights and weak parameters; outside the interval nothing is guided."""
    small = Generator(narrow, (8, 8, 3), 4, one_device)
    weak = Weak(small.network, unet_params(narrow, PIXELS, 1))
    generator = Generator(config, (8, 8, 3), 4, one_device, weak=weak)
    params = unet_params(config, PIXELS, 0)

    def draw(w, **settings):
        settings = ConfigDict({**config.sample.to_dict(), "steps": 4, "guidance": w, **settings})
        return generator(params, settings, np.arange(4)).astype(int)

    everywhere, plain = draw(2.0), draw(0.0)
    assert (draw(1.0) != everywhere).any() and (draw(2.0, guidance_rescale=0.7) != everywhere).any()
    generator._others["weak"] = unet_params(narrow, PIXELS, 2)
    assert (draw(2.0) != everywhere).any()
    assert generator._run._cache_size() == 2  # with guidance, and without
    assert np.abs(draw(2.0, guidance_interval=(600, 700)) - plain).max() <= 1  # t = 750, 500, 250, 0
    assert (draw(2.0, guidance_interval=(200, 600)) != plain).any()


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_weights_are_those_of_the_main_model(folder, config, narrow, weights):
    config = ConfigDict(config.to_dict())
    config.sample.update(autoguidance=str(folder / "weak"), weights=weights)
    weak, step = load_weak(config, folder / "main", 3, PIXELS, meshes.make_mesh(), None)
    expected = unet_params(narrow, PIXELS, 1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b if weights == "ema" else b / 2), weak.params, expected)
    assert step == 3 and weak.network.channels == 4


@pytest.mark.parametrize(
    ("settings", "meta", "weak_field", "words"),
    [
        ({"autoguidance": "main"}, {}, {}, "_step = 3: must be one of 3 of .*main, and not the one that is guided"),
        ({"autoguidance_step": 2}, {}, {}, "_step = 2: must be one of 1, 3 of .*weak"),
        ({"autoguidance": "none"}, {}, {}, "autoguidance = '.*none': must be a workdir with a config.json"),
        ({"autoguidance": "empty"}, {}, {}, "autoguidance = '.*empty': must be a workdir with a checkpoint"),
        ({}, {"class_names": NAMES[::-1]}, {}, r"classes \['owl', .*\] as .*main, not \['cat', .*\]"),
        ({}, {"shape": [4, 4, 3]}, {}, r"shape \[4, 4, 3\] as .*main, not \[8, 8, 3\]"),
        ({}, {}, {"diffusion.schedule": "cosine"}, "diffusion.schedule 'linear' as .*main, not 'cosine'"),
        ({}, {}, {"diffusion.beta_end": 0.01}, "diffusion.beta_end 0.02 as .*main, not 0.01"),
        ({}, {}, {"experiment": "ldm"}, "experiment 'ddpm' as .*main, not 'ldm'"),
    ],
)
def test_what_does_not_belong_together_is_one_line(folder, tmp_path, config, settings, meta, weak_field, words):
    (tmp_path / "empty").mkdir()
    files.save(config, tmp_path / "empty" / "config.json")
    for name in ("main", "weak"):
        shutil.copytree(folder / name, tmp_path / name, ignore=shutil.ignore_patterns("samples"))
    path = tmp_path / "weak" / "config.json"
    other = files.load(path)
    other.update_from_flattened_dict(weak_field)
    files.save(other, path)
    config = ConfigDict(config.to_dict())
    config.sample.update({"autoguidance": "weak", **settings}, guidance=1.0)
    config.sample.autoguidance = str(tmp_path / config.sample.autoguidance)
    check.validate_sample(config)
    with pytest.raises(ConfigError, match=words) as error:
        load_weak(config, tmp_path / "main", 3, {**PIXELS, **meta}, meshes.make_mesh(), None)
    assert "\n" not in str(error.value)


def test_latents_must_be_of_one_autoencoder_and_whitened_alike(tmp_path, tiny):
    config, mesh = tiny("ldm"), meshes.make_mesh()
    config.autoencoder.update(channels=4, channel_mult=(1, 1), norm_groups=4)
    config.model.update(channels=4, channel_mult=(1,), attention_resolutions=(), head_dim=4)
    config.sample.update(autoguidance=str(tmp_path / "weak"), guidance=1.0)
    save(config, tmp_path / "weak", unet_params(config, LATENTS, 0), LATENTS)
    model = build_autoencoder(config)
    image, noise = np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 8, 8, 2), np.float32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), image, noise)
    own = randomised(abstract, 0)
    save(vae_config(config), tmp_path / "weak" / "autoencoder", own, {"class_names": NAMES})

    def load(params, **changes):
        meta = {**LATENTS, **changes}
        return load_weak(config, tmp_path / "main", 3, meta, mesh, Decoder(params, Whitening(**meta["whitening"])))

    load(own)  # the same in every bit, if in another folder
    with pytest.raises(ConfigError, match="autoencoder '[0-9a-f.]+' as .*main, not '[0-9a-f.]+'"):
        load(randomised(abstract, 1))
    with pytest.raises(
        ConfigError, match=r"whitening {'mean': \[0.6, 0.5\].*} as .*main, not {'mean': \[0.5, 0.5\].*}"
    ):
        load(own, whitening={"mean": [0.6, 0.5], "std": [1.0, 1.0]})
    in_place = str(tmp_path / "weak" / "autoencoder")
    load(own, autoencoder=in_place)
