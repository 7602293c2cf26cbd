"""The check of a config before anything compiles."""

import math
import pathlib

from ml_collections import ConfigDict

from jaxdiff.build import NETWORKS
from jaxdiff.config.check_diffusion import CONTINUOUS, validate_diffusion, validate_start, validate_steps
from jaxdiff.config.fields import guidance_weights
from jaxdiff.config.require import at_least, get_field, one_of, require
from jaxdiff.data.sources import SOURCES
from jaxdiff.evaluation import reconstruction
from jaxdiff.evaluation.extractors import EXTRACTORS
from jaxdiff.evaluation.scores import FEATURE_SCORES, SCORES
from jaxdiff.models.discriminator import patches
from jaxdiff.models.dit import DITS
from jaxdiff.models.unet import REMAT
from jaxdiff.training.averages import WIDEST, parse_weights

EXPERIMENTS = ("ldm", "ddpm", "vae")


def validate(config: ConfigDict, num_devices: int) -> None:
    """ConfigError with one line that names the first field whose value is impossible or contradicts another."""
    _validate_numbers(config)
    one_of(config, "experiment", EXPERIMENTS)
    one_of(config, "dtype", ("auto", "float32", "bfloat16"))
    at_least(config, 0, "seed")
    validate_data(config)
    _validate_recipe(config, "", num_devices)
    size, name = config.data.image_size, "data.image_size"
    if "autoencoder" in config:
        factor = _validate_autoencoder(config)
        size, name = size // factor, f"data.image_size / {factor}"
        if config.experiment == "ldm" and not config.autoencoder.path:
            _validate_recipe(config, "autoencoder.train.", num_devices)
    if "model" in config:
        _validate_network(config, size, name)
        validate_diffusion(config)
        validate_sample(config)
        one = isinstance(config.sample.guidance, int | float)
        require(one, "sample.guidance", config.sample.guidance, "one number, but for --mode=sample")
        weak = config.sample.autoguidance
        require(not weak, "sample.autoguidance", weak, "left out, but for --mode=sample")
        weights = config.sample.weights
        tracked = isinstance(parse_weights(weights, config), str)
        require(tracked, "sample.weights", weights, "one that is tracked, as in ema_sigma_rel, but for --mode=sample")
        validate_eval(config)
        for field in ("images", "steps", "nll"):
            value = config.eval[field]
            require(not value, f"eval.{field}", value, "left out, but for --mode=evaluate")


def _validate_numbers(config: ConfigDict, prefix: str = "") -> None:
    """No number is infinite, or larger than what holds it; tuples are of numbers, but for those of names."""
    for name, value in config.items():
        field = prefix + name
        if isinstance(value, ConfigDict):
            _validate_numbers(value, f"{field}.")
        elif name not in ("scores", "classes", "guidance", "ema_decays", "ema_sigma_rel"):
            several = isinstance(value, tuple | list)
            for number in value if several else [value]:
                require(not several or type(number) in (int, float), field, value, "of numbers")
                require(not isinstance(number, float) or not math.isinf(number), field, value, "finite")
                require(not isinstance(number, int) or abs(number) < 2**63, field, value, "below 2^63")


def validate_data(config: ConfigDict) -> None:
    """The check of the fields `data`, all that --mode=prepare needs."""
    d = config.data
    one_of(config, "data.source", tuple(SOURCES))
    at_least(config, 8, "data.image_size")
    at_least(config, 1, "data.threads")
    at_least(config, 0, "data.workers", "data.cache_gb")
    require(0 <= d.max_rejected <= 1, "data.max_rejected", d.max_rejected, "in [0, 1]")
    if d.source == "folder":
        require(bool(d.path), "data.path", d.path, "a folder with {train,val}/<class>/*.jpg")
    if d.source == "npz":
        require(bool(d.path), "data.path", d.path, "an .npz file of uint8 images")
    require(bool(d.name) == (d.source == "tfds"), "data.name", d.name, "given with data.source = 'tfds' and only there")
    require(not d.classes or d.source == "tfds", "data.classes", d.classes, "empty where data.source is not 'tfds'")


def _validate_recipe(config: ConfigDict, prefix: str, num_devices: int) -> None:
    at_least(
        config,
        1,
        *(prefix + f for f in ("batch_size", "accumulate", "log_every", "checkpoint_every", "keep")),
    )
    at_least(config, 0, *(prefix + f for f in ("epochs", "steps", "warmup_steps", "weight_decay", "sample_every")))
    r = get_field(config, prefix[:-1]) if prefix else config
    require(r.lr > 0, f"{prefix}lr", r.lr, "positive")
    require(r.clip_norm > 0, f"{prefix}clip_norm", r.clip_norm, "positive")
    betas = tuple(r.adam_betas)
    in_range = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
    require(in_range, f"{prefix}adam_betas", betas, "two numbers in [0, 1)")
    require(0 <= r.ema_decay < 1, f"{prefix}ema_decay", r.ema_decay, "in [0, 1)")
    _validate_averages(r, prefix, "model" in config and not prefix)
    one = (r.epochs > 0) != (r.steps > 0)
    require(one, f"{prefix}epochs", r.epochs, f"0 or {prefix}steps = {r.steps} must be 0, and not both")
    parts = num_devices * r.accumulate
    allowed = f"a multiple of {parts} ({num_devices} devices x {prefix}accumulate {r.accumulate})"
    require(r.batch_size % parts == 0, f"{prefix}batch_size", r.batch_size, allowed)


def _validate_averages(r: ConfigDict, prefix: str, diffusion: bool) -> None:
    for field in ("ema_decays", "ema_sigma_rel"):
        values = tuple(r[field])
        require(diffusion or not values, f"{prefix}{field}", values, "empty for an autoencoder: `ema` is all it needs")
        numbers = all(isinstance(value, int | float) for value in values) and len(set(values)) == len(values)
        if field == "ema_decays":
            fits = numbers and all(0 <= value < 1 and value != r.ema_decay for value in values)
            allowed = f"different numbers in [0, 1), without ema_decay = {r.ema_decay}, which is tracked anyway"
        else:
            fits = numbers and all(0 < value <= WIDEST for value in values)
            allowed = f"different numbers in (0, {WIDEST}]"
        require(fits, f"{prefix}{field}", values, allowed)
    every = r.ema_snapshot_every
    require(every >= 0, f"{prefix}ema_snapshot_every", every, "at least 0")
    allowed = f"0 with {prefix}ema_sigma_rel = (): these are what is kept"
    require(not every or len(r.ema_sigma_rel) > 0, f"{prefix}ema_snapshot_every", every, allowed)


def _validate_autoencoder(config: ConfigDict) -> int:
    a = config.autoencoder
    at_least(
        config,
        1,
        "autoencoder.channels",
        "autoencoder.num_res_blocks",
        "autoencoder.latent_channels",
        "autoencoder.norm_groups",
    )
    whole = len(a.channel_mult) > 0 and all(type(mult) is int and mult > 0 for mult in a.channel_mult)
    require(whole, "autoencoder.channel_mult", a.channel_mult, "not empty, of whole numbers above 0")
    for level in a.attention_levels:
        known = level in range(len(a.channel_mult))
        require(known, "autoencoder.attention_levels", level, f"in 0..{len(a.channel_mult) - 1}")
    factor = 2 ** (len(a.channel_mult) - 1)
    size = config.data.image_size
    require(size % factor == 0, "data.image_size", size, f"a multiple of the autoencoder's downsampling, {factor}")
    at_least(config, 0, "autoencoder.kl_weight", "autoencoder.perceptual_weight", "autoencoder.disc_weight")
    at_least(config, 1, "autoencoder.disc_layers")
    require(0 <= a.disc_start <= 1, "autoencoder.disc_start", a.disc_start, "a share of the steps, in [0, 1]")
    fits = not a.disc_weight or patches(size, a.disc_layers) >= 1
    require(fits, "autoencoder.disc_layers", a.disc_layers, f"less for images of {size} pixels")
    known = not a.lpips or pathlib.Path(a.lpips).is_file()
    require(known, "autoencoder.lpips", a.lpips, "empty, or a file with the weights of LPIPS(net='vgg')")
    used = not a.lpips or a.perceptual_weight > 0
    require(used, "autoencoder.lpips", a.lpips, "empty with autoencoder.perceptual_weight = 0")
    for score in a.scores:
        require(
            score in reconstruction.SCORES, "autoencoder.scores", score, f"among {', '.join(reconstruction.SCORES)}"
        )
    return factor


def _validate_network(config: ConfigDict, size: int, size_name: str) -> None:
    m = config.model
    one_of(config, "model.name", tuple(NETWORKS))
    one_of(config, "model.remat", tuple(REMAT))
    at_least(config, 0, "model.attention_chunk")
    require(0 <= m.dropout < 1, "model.dropout", m.dropout, "in [0, 1)")
    if m.name in DITS:
        allowed = f"of patches that divide {size_name} = {size}"
        require(size % DITS[m.name]["patch"] == 0, "model.name", m.name, allowed)
    else:
        _validate_unet(config, size, size_name)


def _validate_unet(config: ConfigDict, size: int, size_name: str) -> None:
    m = config.model
    at_least(config, 1, "model.channels", "model.num_res_blocks", "model.head_dim", "model.norm_groups")
    at_least(config, 0, "model.context_tokens", "model.num_heads")
    tokens = m.conditional or m.context_tokens == 0
    require(tokens, "model.context_tokens", m.context_tokens, "0 with model.conditional = False")
    require(m.downsample_padding in (0, 1), "model.downsample_padding", m.downsample_padding, "0 or 1")
    require(m.norm_eps > 0, "model.norm_eps", m.norm_eps, "positive")
    allowed = f"in [0, model.channels / 2 = {m.channels // 2})"
    require(0 <= m.freq_shift < m.channels // 2, "model.freq_shift", m.freq_shift, allowed)
    require(len(m.channel_mult) > 0, "model.channel_mult", m.channel_mult, "not empty")
    deepest = 2 ** (len(m.channel_mult) - 1)
    allowed = f"shorter: {size_name} = {size} is not a multiple of 2^(levels - 1) = {deepest}"
    require(size % deepest == 0, "model.channel_mult", m.channel_mult, allowed)
    widths = {size // 2**i: round(m.channels * mult) for i, mult in enumerate(m.channel_mult)}
    for mult in m.channel_mult:
        allowed = f"such that every level has channels: model.channels = {m.channels}"
        require(m.channels * mult > 0.5, "model.channel_mult", m.channel_mult, allowed)
    for name in ("attention_resolutions", "cross_resolution"):
        for r in m[name]:
            allowed = f"among the resolutions of the UNet, {', '.join(map(str, widths))}"
            require(r in widths, f"model.{name}", r, allowed)
    field = "num_heads" if m.num_heads else "head_dim"
    for r in {*m.attention_resolutions, *m.cross_resolution} | ({min(widths)} if m.mid_attention else set()):
        allowed = f"a divisor of the {widths[r]} channels at resolution {r}"
        require(widths[r] % m[field] == 0, f"model.{field}", m[field], allowed)


def validate_sample(config: ConfigDict) -> None:
    """The check of the fields `sample`, which --mode=sample repeats after its changes."""
    s, d = config.sample, config.diffusion
    _validate_numbers(s, "sample.")
    at_least(config, 0, "sample.seed")
    parse_weights(s.weights, config)
    one_of(config, "sample.format", ("npz", "png"))
    validate_steps(config)
    weights = guidance_weights(s)
    numbers = all(type(w) in (int, float) and 0 <= w < math.inf for w in weights)
    allowed = "a number, or several as in (0.,1.5), at least 0 (w in (1+w) cond - w uncond)"
    require(len(weights) > 0 and numbers, "sample.guidance", s.guidance, allowed)
    guided = max(weights) > 0
    for field in ("conditional", "null_class"):
        fits = config.model[field] or not guided or s.autoguidance
        require(fits, "sample.guidance", s.guidance, f"0 with model.{field} = False, but for sample.autoguidance")
    fits = config.model.conditional or not s.classes
    require(fits, "sample.classes", s.classes, "empty with model.conditional = False")
    trained = not guided or d.label_dropout > 0 or s.autoguidance
    allowed = "0 with diffusion.label_dropout = 0, which trains no null class, but for sample.autoguidance"
    require(trained, "sample.guidance", s.guidance, allowed)
    at_least(config, 0, "sample.autoguidance_step")
    step = s.autoguidance_step
    require(not step or s.autoguidance, "sample.autoguidance_step", step, "left out without sample.autoguidance")
    interval = tuple(s.guidance_interval)
    last = {"edm": math.inf, "flow": 1}.get(d.schedule, d.num_steps - 1)
    ordered = len(interval) == 2 and 0 <= interval[0] <= interval[1] <= last
    allowed = f"empty or (first, last) in 0..{last}"
    require(not interval or ordered, "sample.guidance_interval", interval, allowed)
    require(0 <= s.guidance_rescale <= 1, "sample.guidance_rescale", s.guidance_rescale, "in [0, 1]")
    for field in ("guidance_interval", "guidance_rescale", "autoguidance"):
        used = s[field]
        require(not used or guided, f"sample.{field}", used, f"left out with sample.guidance = {s.guidance}")
    at_least(config, 1, "sample.num", "sample.batch_size")
    require(s.num < 2**31, "sample.num", s.num, "below 2^31")
    at_least(config, 0, "sample.decode_batch")
    require(s.decode_tile == 0 or s.decode_tile >= 8, "sample.decode_tile", s.decode_tile, "0 or at least 8")
    for field in ("decode_batch", "decode_tile"):
        require(not s[field] or "autoencoder" in config, f"sample.{field}", s[field], "0 where no latents are decoded")


def validate_eval(config: ConfigDict) -> None:
    """The check of the fields `eval`, which --mode=evaluate repeats after its changes."""
    e, s, d = config.eval, config.sample, config.diffusion
    _validate_numbers(e, "eval.")
    require(e.num < 2**31, "eval.num", e.num, "below 2^31")
    for score in e.scores:
        require(score in SCORES, "eval.scores", score, f"among {', '.join(SCORES)}")
        asks = score == "knn_accuracy" and not config.model.conditional
        require(not asks, "eval.scores", score, "left out with model.conditional = False: no class is asked for")
    one_of(config, "eval.extractor", tuple(EXTRACTORS))
    one_of(config, "eval.resize", ("pytorch", "tf1"))
    one_of(config, "eval.reference", ("val", "train"))
    inception = e.extractor == "inception"
    for field, default in (("inception", ""), ("resize", "pytorch")):
        used = inception or e[field] == default
        require(used, f"eval.{field}", e[field], f"left out with eval.extractor = {e.extractor!r}")
    found = not inception or pathlib.Path(e.inception).is_file()
    require(found, "eval.inception", e.inception, "a file with InceptionV3's weights, .pth or .safetensors")
    at_least(config, 0, "eval.num", "eval.neighbours", "eval.every", "eval.nll_num")
    at_least(config, 1, "eval.splits", "eval.k")
    for steps in e.steps:
        last = math.inf if d.schedule in CONTINUOUS else d.num_steps
        whole = type(steps) is int and 1 <= steps <= last
        require(whole, "eval.steps", steps, f"whole numbers in 1..{last} (diffusion.num_steps)")
        validate_start(config, "eval.steps", steps)
    fits = not e.nll or d.schedule not in CONTINUOUS
    require(fits, "eval.nll", e.nll, f"False with diffusion.schedule = {d.schedule!r}: the bound is of discrete steps")
    nums = {} if e.images else {"eval.num" if e.num else "sample.num": e.num or s.num}
    nums |= {"eval.every_num": e.every_num} if e.every else {}
    for field, num in nums.items():
        for score in e.scores:
            least = FEATURE_SCORES[score].least(e) if score in FEATURE_SCORES else 1
            require(num >= least, field, num, f"at least {least} for the score {score!r}")
