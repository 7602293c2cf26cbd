"""Every impossible config is one line that names the field, its value and what is allowed, before anything compiles."""

import pytest

from configs import ddpm, ldm_cfg, vae
from jaxdiff.config import check, fields
from jaxdiff.errors import ConfigError

CONFIGS = {"ldm": ldm_cfg, "ddpm": ddpm, "vae": vae}

WRONG = [
    # experiment, field, value, what is allowed
    ("ddpm", "dtype", "float16", "auto, float32, bfloat16"),
    ("ddpm", "data.source", "digit", "did you mean 'digits'"),
    ("ddpm", "data.image_size", 4, "at least 8"),
    ("ddpm", "batch_size", 100, "a multiple of 8 (8 devices x accumulate 1)"),
    ("ddpm", "batch_size", 0, "at least 1"),
    ("ddpm", "accumulate", 3, None),
    ("ddpm", "lr", 0.0, "positive"),
    ("ddpm", "lr", float("nan"), "positive"),
    ("ddpm", "ema_decay", 1.0, "in [0, 1)"),
    ("ddpm", "ema_decays", (0.9, 1.0), "different numbers in [0, 1)"),
    ("ddpm", "ema_decays", (0.9, 0.9), "different numbers in [0, 1)"),
    ("ddpm", "ema_decays", (0.99,), "without ema_decay = 0.99"),
    ("ddpm", "ema_sigma_rel", (0.05, 0.3), "different numbers in (0, 0.288]"),
    ("ddpm", "ema_sigma_rel", ("0.05",), "different numbers in (0, 0.288]"),
    ("ddpm", "ema_snapshot_every", -1, "at least 0"),
    ("ddpm", "ema_snapshot_every", 100, "0 with ema_sigma_rel = ()"),
    ("vae", "ema_decays", (0.9,), "empty for an autoencoder"),
    ("ldm", "autoencoder.train.ema_sigma_rel", (0.1,), "empty for an autoencoder"),
    ("ddpm", "epochs", 3.0, "steps"),
    ("ddpm", "steps", 0, None),
    ("ddpm", "weight_decay", -1.0, "at least 0"),
    ("ddpm", "model.name", "unets", "did you mean 'unet'"),
    ("ddpm", "model.name", "dit_m2", "one of unet, dit_s2, dit_s4"),
    ("ldm", "model.name", "dit_b8", "of patches that divide data.image_size / 8 = 4"),
    ("ddpm", "model.attention_resolutions", (8, 5), "16, 8, 4"),
    ("ddpm", "model.channel_mult", (1, 1, 1, 1, 1, 1, 1), "2^(levels - 1) = 64"),
    ("ddpm", "model.channel_mult", (), "not empty"),
    ("ddpm", "model.head_dim", 24, "divisor of the 64 channels"),
    ("ddpm", "model.dropout", 1.0, "in [0, 1)"),
    ("ddpm", "model.num_heads", 3, "divisor of the 64 channels"),
    ("ddpm", "model.num_heads", -1, "at least 0"),
    ("ddpm", "model.channel_mult", (1, 0.01), "every level has channels"),
    ("ddpm", "model.downsample_padding", 2, "0 or 1"),
    ("ddpm", "model.norm_groups", 0, "at least 1"),
    ("ddpm", "model.norm_eps", 0.0, "positive"),
    ("ddpm", "model.freq_shift", 16.0, "[0, model.channels / 2 = 16)"),
    ("ddpm", "model.cross_resolution", (8, 5), "among the resolutions of the UNet, 16, 8, 4"),
    ("ddpm", "model.attention_chunk", -1, "at least 0"),
    ("ddpm", "model.remat", "block", "did you mean 'blocks'"),
    ("ddpm", "model.conditional", False, None),
    ("ddpm", "diffusion.scaling_factor", 0.18215, "0 where there are no latents"),
    ("ldm", "diffusion.scaling_factor", -1.0, "at least 0"),
    ("ddpm", "model.null_class", False, None),
    ("ddpm", "diffusion.schedule", "cosin", "did you mean 'cosine'"),
    ("ddpm", "diffusion.num_steps", 1, "at least 2"),
    ("ddpm", "diffusion.beta_start", 0.5, "beta_end"),
    ("ddpm", "diffusion.label_dropout", 1.0, "in [0, 1)"),
    ("ddpm", "diffusion.prediction", "epsilon", "eps, x0, v, flow, edm"),
    ("ddpm", "diffusion.sigma_data", 0.0, "positive"),
    ("ddpm", "diffusion.noise_shift", 0.0, "positive"),
    ("ddpm", "diffusion.loss", "hybird", "did you mean 'hybrid'"),
    ("ddpm", "diffusion.loss", "hybrid", "mse with model.learned_variance = False"),
    ("ddpm", "model.learned_variance", True, None),
    ("ddpm", "diffusion.weighting", "minsnr", "did you mean 'min_snr'"),
    ("ddpm", "diffusion.weighting", "edm", "simple with diffusion.prediction = 'eps'"),
    ("ddpm", "diffusion.weighting_gamma", 5.0, "0 with diffusion.weighting = 'simple'"),
    ("ddpm", "diffusion.time_sampling", "lognormal", "uniform or importance with diffusion.schedule = 'linear'"),
    ("ddpm", "diffusion.time_sampling", "importance", "uniform with diffusion.loss = 'mse'"),
    ("ddpm", "diffusion.time_normal", (0.0, 1.0), "empty, or with diffusion.time_sampling lognormal"),
    ("ddpm", "sample.sigmas", (80.0, 0.002, 7.0), "(smallest, largest, rho)"),
    ("ddpm", "sample.churn", (1.0, 2.0), "(amount,) or (amount, S_min, S_max, S_noise)"),
    ("ddpm", "sample.churn", (1.0,), "empty, but with diffusion.schedule = 'edm'"),
    ("ddpm", "eval.nll_num", -1, "at least 0"),
    ("ddpm", "eval.nll", True, "left out, but for --mode=evaluate"),
    ("ddpm", "sample.sampler", "dim", "did you mean 'ddim'"),
    ("ddpm", "sample.spacing", "even", "one of leading, trailing"),
    ("ddpm", "sample.steps", 1001, "1..1000"),
    ("ddpm", "sample.eta", 1.5, "in [0, 1]"),
    ("ddpm", "sample.guidance", -0.5, "at least 0"),
    ("ldm", "sample.guidance", (0.0, -1.5), "at least 0"),
    ("ldm", "sample.guidance", (1.0, float("inf")), "at least 0"),
    ("ldm", "sample.guidance", (), "a number, or several"),
    ("ldm", "sample.guidance", "strong", "a number, or several"),
    ("ldm", "sample.guidance", (0.0, 1.5), "one number, but for --mode=sample"),
    ("ddpm", "sample.weights", "best", "ema, raw"),
    ("ddpm", "sample.weights", "ema:0.9", "ema, raw"),
    ("ddpm", "sample.weights", "sigma_rel:0.05", "ema, raw"),
    ("ldm", "sample.guidance_interval", (5, 3), "(first, last) in 0..999"),
    ("ldm", "sample.guidance_interval", (0, 1000), "(first, last) in 0..999"),
    ("ddpm", "sample.guidance_interval", (1, 3), "left out with sample.guidance = 0"),
    ("ldm", "sample.guidance_rescale", 1.5, "in [0, 1]"),
    ("ddpm", "sample.guidance_rescale", 0.5, "left out with sample.guidance = 0"),
    ("ddpm", "sample.autoguidance", "runs/weak", "left out with sample.guidance = 0.0"),
    ("ldm", "sample.autoguidance", "runs/weak", "left out, but for --mode=sample"),
    ("ldm", "sample.autoguidance_step", -1, "at least 0"),
    ("ldm", "sample.autoguidance_step", 800, "left out without sample.autoguidance"),
    ("ldm", "sample.decode_batch", -1, "at least 0"),
    ("ldm", "sample.decode_tile", 7, "0 or at least 8"),
    ("ddpm", "sample.decode_batch", 8, "0 where no latents are decoded"),
    ("ddpm", "sample.decode_tile", 8, "0 where no latents are decoded"),
    ("ddpm", "sample.format", "jpg", "npz, png"),
    ("ddpm", "sample.batch_size", 0, "at least 1"),
    ("ddpm", "eval.scores", ("fid",), "knn_accuracy"),
    ("ddpm", "eval.extractor", "incepton", "did you mean 'inception'"),
    ("ddpm", "eval.inception", "weights.pth", "left out with eval.extractor = 'effnet_lite0'"),
    ("ddpm", "eval.resize", "tf1", "left out with eval.extractor"),
    ("ddpm", "eval.resize", "tf2", "one of pytorch, tf1"),
    ("ddpm", "eval.reference", "test", "one of val, train"),
    ("ddpm", "eval.num", 1, "at least 2 for the score 'fd'"),
    ("ddpm", "eval.every", -1, "at least 0"),
    ("ddpm", "eval.splits", 0, "at least 1"),
    ("ddpm", "eval.k", 0, "at least 1"),
    ("ddpm", "eval.images", "x.npz", "left out, but for --mode=evaluate"),
    ("ddpm", "eval.steps", (10,), "left out, but for --mode=evaluate"),
    ("ddpm", "eval.neighbours", -1, "at least 0"),
    ("ldm", "autoencoder.channel_mult", (), "not empty"),
    ("ldm", "autoencoder.channel_mult", (0, 1), "of whole numbers above 0"),
    ("ldm", "autoencoder.channel_mult", (1, 1.5), "of whole numbers above 0"),
    ("ldm", "autoencoder.attention_levels", (4,), "in 0..3"),
    ("ldm", "autoencoder.train.batch_size", 12, "multiple of 8"),
    ("ldm", "autoencoder.train.lr", -1.0, "positive"),
    ("ldm", "data.image_size", 36, "multiple of the autoencoder's downsampling, 8"),
    ("vae", "keep", 0, "at least 1"),
    ("vae", "adam_betas", (0.9, 1.0), "two numbers in [0, 1)"),
    ("ldm", "autoencoder.train.adam_betas", (0.9,), "two numbers in [0, 1)"),
    ("vae", "autoencoder.kl_weight", -1e-6, "at least 0"),
    ("vae", "autoencoder.perceptual_weight", -1.0, "at least 0"),
    ("vae", "autoencoder.disc_weight", -0.5, "at least 0"),
    ("vae", "autoencoder.disc_start", 1.5, "a share of the steps, in [0, 1]"),
    ("vae", "autoencoder.disc_layers", 0, "at least 1"),
    ("vae", "autoencoder.lpips", "nowhere.pth", "a file with the weights of LPIPS"),
    ("vae", "autoencoder.lpips", __file__, "empty with autoencoder.perceptual_weight = 0"),
    ("vae", "autoencoder.scores", ("fid",), "among rfd_effnet_lite0, effnet_lite0_distance"),
]


def config_of(experiment):
    return CONFIGS[experiment].get_config("digits")


@pytest.mark.parametrize("experiment", CONFIGS)
@pytest.mark.parametrize("dataset", fields.DATASETS)
def test_all_presets_are_possible(experiment, dataset):
    config = CONFIGS[experiment].get_config(dataset)
    if dataset in ("folder", "npz"):
        config.data.path = "somewhere"
    for devices in (1, 2, 4, 8):
        check.validate(config, devices)
    assert config.name == f"{experiment}-{dataset.replace(':', '-')}"


@pytest.mark.parametrize("experiment", ["ldm", "ddpm"])
def test_a_dit_takes_the_place_of_the_unet_of_any_preset(experiment):
    for dataset in ("digits", "cifar10", "imagenet100"):
        config = CONFIGS[experiment].get_config(dataset)
        config.model.name = "dit_b2"
        check.validate(config, 8)
    config.model.conditional = False  # it has no context_tokens that would contradict
    config.diffusion.label_dropout = config.sample.guidance = 0.0
    check.validate(config, 8)
    config.model.dropout = 1.0
    with pytest.raises(ConfigError, match=r"config.model.dropout = 1.0: must be in \[0, 1\)"):
        check.validate(config, 8)


def test_tfds_by_name():
    data = CONFIGS["ldm"].get_config("tfds:imagenette/160px").data
    assert (data.source, data.name) == ("tfds", "imagenette/160px")
    assert CONFIGS["ldm"].get_config("tfds:imagenette/160px").name == "ldm-tfds-imagenette-160px"
    small, same = CONFIGS["ddpm"].get_config("tfds:cifar10"), CONFIGS["ddpm"].get_config("cifar10")
    assert small.model == same.model and small.data.image_size == same.data.image_size == 32


@pytest.mark.parametrize("experiment", ["ldm", "ddpm"])
def test_imagenet100_is_the_mission_s_recipe(experiment):
    config = CONFIGS[experiment].get_config("imagenet100")
    recipe = {field: config[field] for field in ("lr", "weight_decay", "clip_norm", "epochs", "steps", "warmup_steps")}
    assert recipe == dict(lr=1e-4, weight_decay=1e-4, clip_norm=1.0, epochs=50.0, steps=0, warmup_steps=0)
    diffusion = dict(schedule="linear", num_steps=1000, beta_start=2e-4, beta_end=0.02, label_dropout=0.1)
    diffusion |= dict(prediction="eps", loss="mse", weighting="simple", time_sampling="uniform", stratified=False)
    diffusion |= dict(noise_shift=1.0, zero_terminal_snr=False, scaling_factor=0.0)
    assert {name: config.diffusion[name] for name in diffusion} == diffusion
    assert config.data.image_size == 128


@pytest.mark.parametrize(("experiment", "field", "value", "allowed"), WRONG)
def test_one_line_names_field_value_and_what_is_allowed(experiment, field, value, allowed):
    config = config_of(experiment)
    check.validate(config, 8)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError) as error:
        check.validate(config, 8)
    line = str(error.value)
    assert "\n" not in line
    if allowed is None:  # two fields contradict each other: either may be named, the other is in the line
        assert field.split(".")[-1] in line
    else:
        each = field.endswith(("resolutions", "cross_resolution", "scores", "levels"))
        shown = value[-1] if isinstance(value, tuple) and each else value
        assert f"config.{field} = {shown!r}: must be" in line
        assert allowed in line


def test_heads_of_attention_across_levels():
    config = config_of("ddpm")
    config.model.update(channels=48, head_dim=32)  # 48 channels at 16 pixels, where there is no attention else
    check.validate(config, 1)
    config.model.cross_resolution = (16,)
    with pytest.raises(ConfigError, match="config.model.head_dim = 32: .* divisor of the 48 channels at resolution 16"):
        check.validate(config, 1)


def test_contradicting_sampler_settings():
    config = config_of("ddpm")
    config.sample.update(sampler="ddpm", eta=0.5)
    with pytest.raises(ConfigError, match=r"config.sample.eta = 0.5: must be 0 with sample.sampler = 'ddpm'"):
        check.validate(config, 8)
    config = config_of("ldm")
    config.diffusion.label_dropout = 0.0
    with pytest.raises(ConfigError, match=r"config.sample.guidance = 2.0: must be 0 with diffusion.label_dropout = 0"):
        check.validate(config, 8)


def test_several_weights_of_guidance():
    config = config_of("ldm")
    config.sample.update(guidance=(0, 1.5), guidance_rescale=0.7)
    check.validate_sample(config)
    config.sample.guidance = (0.0, 0.0)
    with pytest.raises(ConfigError, match=r"guidance_rescale = 0.7: .* left out with sample.guidance = \(0.0, 0.0\)"):
        check.validate_sample(config)
    config.sample.update(guidance=(0.0, 1.5), guidance_rescale=0.0)
    config.diffusion.label_dropout = 0.0
    with pytest.raises(ConfigError, match=r"guidance = \(0.0, 1.5\): must be 0 with .*label_dropout = 0"):
        check.validate_sample(config)
    config.sample.autoguidance = "runs/weak"  # which needs no null class
    check.validate_sample(config)


def test_labels_that_the_network_does_not_take():
    config = config_of("ldm")
    config.model.conditional = False
    wanted = [
        ("model.context_tokens", 0, "4: must be 0 with model.conditional = False"),
        ("diffusion.label_dropout", 0.0, "0.1: must be 0 with model.conditional = False"),
        ("sample.guidance", 0.0, "2.0: must be 0 with model.conditional = False"),
        ("eval.scores", (), "'knn_accuracy': must be left out with model.conditional = False"),
    ]
    for field, value, line in wanted:
        with pytest.raises(ConfigError, match=f"config.{field} = {line}"):
            check.validate(config, 8)
        config.update_from_flattened_dict({field: value})
    check.validate(config, 8)
    config.sample.classes = "3"
    with pytest.raises(ConfigError, match="config.sample.classes = '3': must be empty with model.conditional = False"):
        check.validate(config, 8)
    config.model.conditional, config.model.null_class, config.sample.guidance = True, False, 1.0
    with pytest.raises(ConfigError, match="config.sample.guidance = 1.0: must be 0 with model.null_class = False"):
        check.validate(config, 8)


def test_unknown_data_set():
    with pytest.raises(ConfigError, match=r":cifar: the data set must be one of digits, cifar10"):
        ldm_cfg.get_config("cifar")


def test_patches_must_fit_into_the_image():
    config = config_of("vae")
    config.autoencoder.disc_layers = 4
    check.validate(config, 1)  # no discriminator
    config.autoencoder.disc_weight = 0.5
    with pytest.raises(ConfigError, match="config.autoencoder.disc_layers = 4: must be less for images of 32 pixels"):
        check.validate(config, 1)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("lr", float("inf"), "config.lr = inf: must be finite"),
        ("epochs", float("inf"), "config.epochs = inf: must be finite"),
        ("diffusion.noise_shift", float("inf"), "noise_shift = inf: must be finite"),
        ("seed", 2**70, "config.seed = .*: must be below 2"),
        ("seed", -1, "config.seed = -1: must be at least 0"),
        ("sample.seed", -1, "config.sample.seed = -1: must be at least 0"),
        ("sample.num", 10**11, "config.sample.num = .*: must be below 2"),
        ("adam_betas", ("a", "b"), "adam_betas = .*: must be of numbers"),
        ("model.channel_mult", ("a", 1), "model.channel_mult = .*: must be of numbers"),
        ("model.attention_resolutions", ([1],), "attention_resolutions = .*: must be of numbers"),
        ("sample.sigmas", ("a", "b", "c"), "sample.sigmas = .*: must be of numbers"),
    ],
)
def test_numbers_are_numbers_and_finite(field, value, words):
    config = ddpm.get_config("digits")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=words):
        check.validate(config, 1)
