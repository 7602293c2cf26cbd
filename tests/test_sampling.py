"""Drawing images: labels, files that are never overwritten, one program for many settings, image k by (seed, k)."""

import json
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxdiff import diffusion, images
from jaxdiff.build import build_autoencoder
from jaxdiff.data.latents import Whitening
from jaxdiff.errors import ConfigError
from jaxdiff.generator import Decoder, Generator
from jaxdiff.keys import named_key
from jaxdiff.samples import columns, sample_labels, save_samples

NAMES = ["cat", "dog", "7"]


def mesh_of(count):
    return jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])


@pytest.mark.parametrize(
    ("classes", "expected"),
    [("", [0, 1, 2] * 2), ("dog", [1] * 6), (" 2, cat ", [2, 0] * 3), ("7", [2] * 6), ("0,0,1", [0, 0, 1] * 2)],
)
def test_labels_by_name_and_number(tiny, classes, expected):
    settings = tiny("ddpm").sample
    settings.update(classes=classes, num=6)
    assert sample_labels(settings, NAMES).tolist() == expected


def test_fewer_images_than_classes_are_of_classes_evenly_spaced(tiny):
    """The first ones of ImageNet are all animals."""
    settings = tiny("ddpm").sample
    settings.num = 4
    assert sample_labels(settings, [f"class {k}" for k in range(10)]).tolist() == [0, 2, 5, 7]
    settings.classes = "9,8,7,6,5,4,3,2"
    assert sample_labels(settings, [f"class {k}" for k in range(10)]).tolist() == [9, 7, 5, 3]


@pytest.mark.parametrize("classes", ["bird", "3", "-1", "cat,dgo"])
def test_an_unknown_class_is_one_line(tiny, classes):
    settings = tiny("ddpm").sample
    settings.classes = classes
    with pytest.raises(ConfigError, match=r"config.sample.classes = '(bird|3|-1|dgo)': must be .*0\.\.2.*cat, dog, 7"):
        sample_labels(settings, NAMES)


def test_columns_hold_one_class_each():
    assert columns(np.resize(np.arange(10), 100)) == 10
    assert columns(np.resize(np.arange(4), 12)) == 4
    assert columns(np.zeros(25, int)) == 10
    assert columns(np.arange(100)) == 10
    assert columns(np.zeros(3, int)) == 3


@pytest.mark.parametrize("format", ["npz", "png"])
def test_files_are_never_overwritten(tmp_path, tiny, format):
    settings = tiny("ddpm").sample
    settings.update(format=format, guidance=1.25)
    samples = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    labels = np.array([0, 1, 0])
    first = save_samples(tmp_path / "s", samples, labels, settings)
    second = save_samples(tmp_path / "s", 255 - samples, labels, settings)
    assert (first.name, second.name) == ("s.png", "s-2.png")
    assert json.loads((tmp_path / "s-2.json").read_text())["guidance"] == 1.25
    if format == "npz":
        with np.load(tmp_path / "s.npz") as data:
            np.testing.assert_array_equal(data["arr_0"], samples)
            np.testing.assert_array_equal(data["arr_1"], labels)
        assert (tmp_path / "s-2.npz").exists()
    else:
        names = ["000000-class0.png", "000001-class1.png", "000002-class0.png"]
        assert sorted(p.name for p in (tmp_path / "s").iterdir()) == names
        assert len(list((tmp_path / "s-2").iterdir())) == 3
    first.unlink()  # moved elsewhere; the others stay as they are
    assert save_samples(tmp_path / "s", 255 - samples, labels, settings).name == "s-3.png"


def randomised(tree):
    """Of the size of trained ones: the zeros of initialisation would make every prediction zero."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [rng.normal(0, 0.2, leaf.shape).astype(np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def config(tiny):
    return tiny("ddpm")


@pytest.fixture(scope="module")
def generator(config):
    return Generator(config, (8, 8, 3), 10, mesh_of(8))


@pytest.fixture(scope="module")
def params(generator):
    return randomised(generator.abstract_params())


def changed(config, **settings):
    return ConfigDict({**config.sample.to_dict(), **settings})


def draw(generator, params, config, labels, **settings):
    return generator(params, changed(config, **settings), np.asarray(labels))


def test_one_program_for_all_steps_weights_samplers_and_spacings(generator, params, config):
    labels = np.arange(16) % 10
    first = draw(generator, params, config, labels, steps=3, guidance=1.5)
    for change in (
        {"steps": 5, "guidance": 1.5},
        {"steps": 3, "guidance": 3.0},
        {"steps": 3, "guidance": 1.5, "eta": 1.0},
        {"steps": 3, "guidance": 1.5, "sampler": "ddpm"},
        {"steps": 3, "guidance": 1.5, "spacing": "trailing"},
        {"steps": 3, "guidance": 1.5, "seed": 1},
    ):
        assert (draw(generator, params, config, labels, **change) != first).any(), change
    assert generator._run._cache_size() == 1
    for steps in (10, 20):  # of multiples of ten there is another
        draw(generator, params, config, labels, steps=steps, guidance=1.5)
    assert generator._run._cache_size() == 2


def test_image_k_depends_on_seed_and_k_alone(generator, params, config):
    labels = np.arange(16) % 10
    settings = {"guidance": 1.5, "sampler": "ddpm"}
    reference = draw(generator, params, config, labels, **settings)
    assert (draw(generator, params, config, labels[:9], **settings) == reference[:9]).all()
    in_parts = draw(generator, params, config, labels, batch_size=8, **settings)
    on_one = Generator(config, (8, 8, 3), 10, mesh_of(1))
    alone = draw(on_one, params, config, labels, **settings)
    rounded_up = draw(generator, params, config, labels, batch_size=9, **settings)
    # Programs of other shapes round otherwise, by a grey level.
    for other in (in_parts, alone, rounded_up):
        assert np.abs(other.astype(int) - reference).max() <= 1


def test_guidance_is_the_formula(generator, params, config):
    """With one step, x0 is linear in eps: guided images are (1+w) cond - w uncond where nothing was clipped."""
    labels = np.full(16, 3)
    settings = {"steps": 1, "clip": False, "spacing": "leading"}  # t = 0, where eps hardly moves x
    cond = draw(generator, params, config, labels, guidance=0.0, **settings)
    guided = draw(generator, params, config, labels, guidance=2.0, **settings)
    uncond = draw(generator, params, config, np.full(16, 10), guidance=0.0, **settings)
    expected = 3.0 * cond - 2.0 * uncond
    inside = (np.minimum(np.minimum(cond, uncond), guided) > 0) & (np.maximum(np.maximum(cond, uncond), guided) < 255)
    assert inside.mean() > 0.3 and (cond != uncond).any()
    assert np.abs(expected - guided)[inside].max() <= 4


def test_guidance_in_an_interval(generator, params, config):
    """All timesteps, none of those that are taken, and some; another interval is no other program."""
    labels = np.arange(16) % 10
    settings = {"steps": 4, "guidance": 2.0, "spacing": "leading"}  # t = 750, 500, 250, 0
    everywhere = draw(generator, params, config, labels, **settings)
    plain = draw(generator, params, config, labels, **{**settings, "guidance": 0.0})
    programs = generator._run._cache_size()
    same = draw(generator, params, config, labels, guidance_interval=(0, 999), **settings)
    none = draw(generator, params, config, labels, guidance_interval=(600, 700), **settings)
    some = draw(generator, params, config, labels, guidance_interval=(200, 600), **settings)
    assert np.abs(same.astype(int) - everywhere).max() <= 1 and np.abs(none.astype(int) - plain).max() <= 1
    assert (some != everywhere).any() and (some != plain).any()
    rescaled = draw(generator, params, config, labels, guidance_rescale=0.7, **settings)
    assert (rescaled != everywhere).any() and generator._run._cache_size() == programs + 1


def test_a_sweep_is_one_program_and_the_runs_at_each_weight(config, params):
    """All weights stand in one batch of 16 here, that without guidance among them."""
    generator = Generator(config, (8, 8, 3), 10, mesh_of(8))
    labels, weights = np.arange(4), (0.0, 1.5, 2, 3.0)
    swept = generator.sweep(params, changed(config, guidance=weights), labels)
    assert swept.shape == (4, 4, 8, 8, 3) and generator._run._cache_size() == 1
    in_pieces = generator.sweep(params, changed(config, guidance=weights, batch_size=8), labels)
    assert generator._run._cache_size() == 2  # one more for two batches of another size
    for w, samples, again in zip(weights, swept, in_pieces, strict=True):
        alone = draw(generator, params, config, labels, guidance=w)
        assert np.abs(samples.astype(int) - alone).max() <= 1 and np.abs(again.astype(int) - alone).max() <= 1
        assert w == 0 or (samples != swept[0]).any(axis=(1, 2, 3)).all()


def test_the_way_from_noise_to_the_image(generator, params, config):
    labels = np.arange(3)
    settings = changed(config, steps=5, guidance=1.5, batch_size=8)
    frames = generator.denoising(params, settings, labels, frames=4)
    assert frames["t"].tolist() == [800, 600, 200, 0] and frames["x_t"].shape == (4, 3, 8, 8, 3)
    keys = diffusion.sample_keys(named_key(settings.seed, "sample"), np.arange(3))
    noise = images.to_uint8(diffusion.initial_noise(keys, (8, 8, 3)))
    np.testing.assert_array_equal(frames["x_t"][0], noise)
    drawn = generator(params, settings, labels).astype(int)
    assert np.abs(frames["x0"][-1] - drawn).max() <= 1  # DDIM ends in the last prediction
    assert (frames["x0"][0] != frames["x0"][-1]).any()


def program(generator, params, config, **settings):
    """The compiled program of a call, which is not run."""
    calls = []

    def run(*args, **flags):
        calls.append((args, flags))
        return np.zeros((16, 1, 1, 3), np.uint8)

    with mock.patch.object(generator, "_run", run):
        draw(generator, params, config, np.arange(16) % 10, **settings)
    args, flags = calls[0]
    return generator._run.lower(*args, **flags).compile()


def test_without_guidance_half_as_much_is_computed(generator, params, config):
    """Floating-point operations of a step, as XLA counts them: of two branches the dearer one."""
    plain, guided, limited = (
        program(generator, params, config, **settings).cost_analysis()["flops"]
        for settings in ({"guidance": 0.0}, {"guidance": 2.0}, {"guidance": 2.0, "guidance_interval": (0, 1)})
    )
    assert 0.49 < plain / guided < 0.53 and 0.99 < limited / guided < 1.01


def latent_generator(config, mesh):
    """A latent model of 12x12 latents, and parameters for it."""
    model = build_autoencoder(config)
    image, noise = jnp.zeros((1, 24, 24, 3)), jnp.zeros((1, 12, 12, 2))
    abstract = jax.eval_shape(model.init, jax.random.key(0), image, noise)
    decoder = Decoder(randomised(abstract), Whitening([0.0, 0.0], [1.0, 1.0]))
    generator = Generator(config, (12, 12, 2), 10, mesh, decoder)
    return generator, randomised(generator.abstract_params())


def test_every_device_decodes_its_own_latents_in_parts(tiny):
    """Two images on each of 8, one by one or in tiles: the same as on one device, with nothing sent to another."""
    config = tiny("ldm")
    config.model.update(channels=8, channel_mult=(1,), attention_resolutions=(), head_dim=8)
    config.autoencoder.update(channels=4, norm_groups=2)
    config.sample.update(steps=2, guidance=0.0)
    on_eight, on_one = (latent_generator(config, mesh_of(count)) for count in (8, 1))
    labels, tiles = np.arange(16) % 10, {"decode_batch": 9, "decode_tile": 8}
    whole = draw(*on_one, config, labels).astype(int)
    assert len(np.unique(whole)) > 50 and len({image.tobytes() for image in whole}) == 16
    assert np.abs(draw(*on_eight, config, labels, decode_batch=1) - whole).max() <= 1
    tiled = draw(*on_eight, config, labels, **tiles).astype(int)
    assert np.abs(tiled - draw(*on_one, config, labels, **tiles)).max() <= 1 and (tiled != whole).any()
    for parts in ({"decode_batch": 1}, tiles):
        text = program(*on_eight, config, **parts).as_text()
        assert not re.search("all-(gather|reduce|to-all)|collective", text)


def test_pixels_there_and_back():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(images.to_uint8(images.to_unit(levels)), levels)
    assert images.to_unit(levels)[0] == -1 and images.to_unit(levels)[255] == 1
    np.testing.assert_array_equal(images.to_uint8(np.array([-3.0, 3.0])), [0, 255])


def test_grid_puts_images_row_by_row():
    sheet = images.grid(np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((3, 2, 2, 3), np.uint8), 2, gap=1)
    assert sheet.shape == (5, 5, 3)
    assert sheet[0, 3, 0] == 1 and sheet[3, 0, 0] == 2 and (sheet[3:, 3:] == 255).all() and (sheet[2] == 255).all()


def test_psnr():
    a = np.zeros((2, 4, 4, 3), np.float32)
    np.testing.assert_allclose(images.psnr(a, a + np.array([0.2, 0.02])[:, None, None, None]), [20, 40], rtol=1e-4)


def test_samplers_compute_nothing_again(config, generator):
    """Of a network that trains with remat: the parameters are the same, and its blocks are open to `hoist`."""
    trained = ConfigDict(config.to_dict())
    trained.model.remat = "blocks"
    again = Generator(trained, (8, 8, 3), 10, mesh_of(1))
    params = generator.abstract_params()
    assert jax.tree.structure(again.abstract_params()) == jax.tree.structure(params)
    x, t, y = jnp.zeros((2, 8, 8, 3)), jnp.zeros(2), jnp.zeros(2, jnp.int32)

    def names(function):
        return {eqn.primitive.name for eqn in jax.make_jaxpr(function)(params, x, t, y).eqns}

    computed_again = names(again.network.apply) - names(generator.network.apply)
    assert len(computed_again) == 1
    assert not computed_again & names(lambda params, *args: again.apply_fn(again.network, params)(*args))
