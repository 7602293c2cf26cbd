"""The check of a config before anything compiles."""

import difflib
import math
import pathlib
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from jaxdiff.build import COMMON, NETWORKS
from jaxdiff.config.fields import guidance_weights
from jaxdiff.data.sources import SOURCES
from jaxdiff.diffusion import PREDICTIONS, SAMPLERS, SCHEDULES, SPACINGS, TIMES, WEIGHTINGS
from jaxdiff.errors import ConfigError
from jaxdiff.evaluation import reconstruction
from jaxdiff.evaluation.extractors import EXTRACTORS
from jaxdiff.evaluation.scores import FEATURE_SCORES, SCORES
from jaxdiff.models.discriminator import patches
from jaxdiff.models.dit import DITS
from jaxdiff.models.unet import REMAT
from jaxdiff.training.averages import WIDEST, parse_weights

EXPERIMENTS = ("ldm", "ddpm", "vae")
CONTINUOUS = {"edm": "karras", "flow": "even"}  # schedules without steps of their own, and how samplers step there
LOSSES = ("mse", "hybrid", "vlb")


def require(ok: bool, field: str, value: Any, allowed: str) -> None:
    """ConfigError "config.<field> = <value>: must be <allowed>" unless `ok`."""
    if not ok:
        raise ConfigError(f"config.{field} = {value!r}: must be {allowed}")


def _one_of(config: ConfigDict, field: str, allowed: Collection[str]) -> None:
    value = _get(config, field)
    close = difflib.get_close_matches(str(value), allowed, 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    require(value in allowed, field, value, f"one of {', '.join(allowed)}{hint}")


def _at_least(config: ConfigDict, bound: float, *fields: str) -> None:
    for field in fields:
        value = _get(config, field)
        require(value >= bound, field, value, f"at least {bound}")


def _get(config: ConfigDict, field: str) -> Any:
    for part in field.split("."):
        config = config[part]
    return config


def validate(config: ConfigDict, num_devices: int) -> None:
    """ConfigError with one line that names the first field whose value is impossible or contradicts another."""
    _one_of(config, "experiment", EXPERIMENTS)
    _one_of(config, "dtype", ("auto", "float32", "bfloat16"))
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
        _validate_diffusion(config)
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


def check_overrides(config: ConfigDict, overrides: Collection[str]) -> None:
    """ConfigError when the command line gives, in `overrides`, a field `model` that the network there does not have."""
    for field in overrides:
        group, _, name = field.rpartition(".")
        if group.split(".")[-1] == "model" and name not in COMMON:
            network = _get(config, group).get("name", "unet")
            allowed = f"left out with {group}.name = {network!r}, which has of {group} {', '.join(COMMON)} only"
            require(network not in DITS, field, _get(config, field), allowed)


def validate_data(config: ConfigDict) -> None:
    """The check of the fields `data`, all that --mode=prepare needs."""
    d = config.data
    _one_of(config, "data.source", tuple(SOURCES))
    _at_least(config, 8, "data.image_size")
    _at_least(config, 1, "data.threads")
    _at_least(config, 0, "data.workers", "data.cache_gb")
    require(0 <= d.max_rejected <= 1, "data.max_rejected", d.max_rejected, "in [0, 1]")
    if d.source == "folder":
        require(bool(d.path), "data.path", d.path, "a folder with {train,val}/<class>/*.jpg")
    if d.source == "npz":
        require(bool(d.path), "data.path", d.path, "an .npz file of uint8 images")
    require(bool(d.name) == (d.source == "tfds"), "data.name", d.name, "given with data.source = 'tfds' and only there")
    require(not d.classes or d.source == "tfds", "data.classes", d.classes, "empty where data.source is not 'tfds'")


def _validate_recipe(config: ConfigDict, prefix: str, num_devices: int) -> None:
    _at_least(
        config,
        1,
        *(prefix + f for f in ("batch_size", "accumulate", "log_every", "checkpoint_every", "keep")),
    )
    _at_least(config, 0, *(prefix + f for f in ("epochs", "steps", "warmup_steps", "weight_decay", "sample_every")))
    r = _get(config, prefix[:-1]) if prefix else config
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
    _at_least(
        config,
        1,
        "autoencoder.channels",
        "autoencoder.num_res_blocks",
        "autoencoder.latent_channels",
        "autoencoder.norm_groups",
    )
    require(len(a.channel_mult) > 0, "autoencoder.channel_mult", a.channel_mult, "not empty")
    for level in a.attention_levels:
        known = level in range(len(a.channel_mult))
        require(known, "autoencoder.attention_levels", level, f"in 0..{len(a.channel_mult) - 1}")
    factor = 2 ** (len(a.channel_mult) - 1)
    size = config.data.image_size
    require(size % factor == 0, "data.image_size", size, f"a multiple of the autoencoder's downsampling, {factor}")
    _at_least(config, 0, "autoencoder.kl_weight", "autoencoder.perceptual_weight", "autoencoder.disc_weight")
    _at_least(config, 1, "autoencoder.disc_layers")
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
    _one_of(config, "model.name", tuple(NETWORKS))
    _one_of(config, "model.remat", tuple(REMAT))
    _at_least(config, 0, "model.attention_chunk")
    require(0 <= m.dropout < 1, "model.dropout", m.dropout, "in [0, 1)")
    if m.name in DITS:
        allowed = f"of patches that divide {size_name} = {size}"
        require(size % DITS[m.name]["patch"] == 0, "model.name", m.name, allowed)
    else:
        _validate_unet(config, size, size_name)


def _validate_unet(config: ConfigDict, size: int, size_name: str) -> None:
    m = config.model
    _at_least(config, 1, "model.channels", "model.num_res_blocks", "model.head_dim", "model.norm_groups")
    _at_least(config, 0, "model.context_tokens", "model.num_heads")
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


def _validate_diffusion(config: ConfigDict) -> None:
    d = config.diffusion
    _one_of(config, "diffusion.schedule", (*SCHEDULES, *CONTINUOUS))
    _at_least(config, 2, "diffusion.num_steps")
    require(
        0 < d.beta_start < d.beta_end < 1,
        "diffusion.beta_start",
        d.beta_start,
        f"in (0, beta_end = {d.beta_end})",
    )
    require(0 <= d.label_dropout < 1, "diffusion.label_dropout", d.label_dropout, "in [0, 1)")
    require(d.scaling_factor >= 0, "diffusion.scaling_factor", d.scaling_factor, "at least 0")
    latent = "autoencoder" in config or d.scaling_factor == 0
    require(latent, "diffusion.scaling_factor", d.scaling_factor, "0 where there are no latents")
    for field in ("conditional", "null_class"):
        fits = config.model[field] or d.label_dropout == 0
        require(fits, "diffusion.label_dropout", d.label_dropout, f"0 with model.{field} = False")
    _validate_prediction(config)
    _validate_loss(config)
    _validate_times(config)


def _validate_prediction(config: ConfigDict) -> None:
    d = config.diffusion
    _one_of(config, "diffusion.prediction", tuple(PREDICTIONS))
    require(d.sigma_data > 0, "diffusion.sigma_data", d.sigma_data, "positive")
    require(d.noise_shift > 0, "diffusion.noise_shift", d.noise_shift, "positive")
    fits = d.schedule != "edm" or d.noise_shift == 1
    require(
        fits, "diffusion.noise_shift", d.noise_shift, "1 with diffusion.schedule = 'edm': see diffusion.time_normal"
    )
    zero, continuous = d.zero_terminal_snr, d.schedule in CONTINUOUS
    allowed = f"False with diffusion.schedule = {d.schedule!r}"
    require(not (zero and continuous), "diffusion.zero_terminal_snr", zero, allowed)
    allowed = "x0, v or flow with diffusion.zero_terminal_snr: pure noise says nothing of the image by its noise"
    require(not zero or d.prediction not in ("eps",), "diffusion.prediction", d.prediction, allowed)
    allowed = "x0, v, flow or edm with diffusion.schedule = 'flow', which begins with pure noise"
    require(d.schedule != "flow" or d.prediction != "eps", "diffusion.prediction", d.prediction, allowed)


def _validate_loss(config: ConfigDict) -> None:
    d, learned = config.diffusion, config.model.learned_variance
    _one_of(config, "diffusion.loss", LOSSES)
    bound = d.loss != "mse"
    allowed = "hybrid or vlb with model.learned_variance = True, whose variance it would not train"
    require(bound or not learned, "diffusion.loss", d.loss, allowed)
    allowed = "mse with model.learned_variance = False: the network has no output channels for a variance"
    require(learned or not bound, "diffusion.loss", d.loss, allowed)
    allowed = f"mse with diffusion.schedule = {d.schedule!r}: the bound is of discrete steps"
    require(not (bound and d.schedule in CONTINUOUS), "diffusion.loss", d.loss, allowed)
    _one_of(config, "diffusion.weighting", tuple(WEIGHTINGS))
    known = WEIGHTINGS[d.weighting].predictions
    allowed = f"simple with diffusion.prediction = {d.prediction!r}; {d.weighting} is defined for {', '.join(known)}"
    require(d.prediction in known, "diffusion.weighting", d.weighting, allowed)
    allowed = f"simple with diffusion.loss = {d.loss!r}, which has weights of its own"
    require(d.weighting == "simple" or not bound, "diffusion.weighting", d.weighting, allowed)
    _at_least(config, 0, "diffusion.weighting_gamma")
    used = not d.weighting_gamma or d.weighting in ("min_snr", "p2")
    allowed = f"0 with diffusion.weighting = {d.weighting!r}"
    require(used, "diffusion.weighting_gamma", d.weighting_gamma, allowed)


def _validate_times(config: ConfigDict) -> None:
    d = config.diffusion
    _one_of(config, "diffusion.time_sampling", (*TIMES, "importance"))
    times = {"edm": ("lognormal",), "flow": ("uniform", "logit_normal")}.get(d.schedule, ("uniform", "importance"))
    allowed = f"{' or '.join(times)} with diffusion.schedule = {d.schedule!r}"
    require(d.time_sampling in times, "diffusion.time_sampling", d.time_sampling, allowed)
    allowed = f"uniform with diffusion.loss = {d.loss!r}; importance is for vlb"
    require(d.time_sampling != "importance" or d.loss == "vlb", "diffusion.time_sampling", d.time_sampling, allowed)
    normal = tuple(d.time_normal)
    fits = len(normal) == 2 and normal[1] > 0 and d.time_sampling in ("lognormal", "logit_normal")
    allowed = "empty, or with diffusion.time_sampling lognormal and logit_normal (mean, positive deviation)"
    require(not normal or fits, "diffusion.time_normal", normal, allowed)


def validate_sample(config: ConfigDict) -> None:
    """The check of the fields `sample`, which --mode=sample repeats after its changes."""
    s, d = config.sample, config.diffusion
    _one_of(config, "sample.sampler", tuple(SAMPLERS))
    parse_weights(s.weights, config)
    _one_of(config, "sample.format", ("npz", "png"))
    _validate_steps(config)
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
    _at_least(config, 0, "sample.autoguidance_step")
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
    _at_least(config, 1, "sample.num", "sample.batch_size")
    _at_least(config, 0, "sample.decode_batch")
    require(s.decode_tile == 0 or s.decode_tile >= 8, "sample.decode_tile", s.decode_tile, "0 or at least 8")
    for field in ("decode_batch", "decode_tile"):
        require(not s[field] or "autoencoder" in config, f"sample.{field}", s[field], "0 where no latents are decoded")


def _validate_steps(config: ConfigDict) -> None:
    """Sampler, timesteps, and what they are used with."""
    s, d = config.sample, config.diffusion
    own = CONTINUOUS.get(d.schedule, "")
    _one_of(config, "sample.spacing", (*SPACINGS, *CONTINUOUS.values()))
    allowed = f"{own or 'one of ' + ', '.join(SPACINGS)} with diffusion.schedule = {d.schedule!r}"
    require(s.spacing == own if own else s.spacing in SPACINGS, "sample.spacing", s.spacing, allowed)
    allowed = "trailing, linspace, adm or dpm with diffusion.zero_terminal_snr: the first step must be from pure noise"
    require(not d.zero_terminal_snr or s.spacing != "leading", "sample.spacing", s.spacing, allowed)
    allowed = f"another with sample.sampler = {s.sampler!r}: its steps do not follow on each other"
    require(s.spacing != "linspace" or not SAMPLERS[s.sampler].multistep, "sample.spacing", s.spacing, allowed)
    if own:
        _at_least(config, 1, "sample.steps")
    else:
        require(1 <= s.steps <= d.num_steps, "sample.steps", s.steps, f"in 1..{d.num_steps} (diffusion.num_steps)")
    require(0 <= s.eta <= 1, "sample.eta", s.eta, "in [0, 1]")
    require(s.eta == 0 or SAMPLERS[s.sampler].eta, "sample.eta", s.eta, f"0 with sample.sampler = {s.sampler!r}")
    sigmas = tuple(s.sigmas)
    fits = len(sigmas) == 3 and 0 < sigmas[0] < sigmas[1] and sigmas[2] > 0
    require(fits, "sample.sigmas", sigmas, "(smallest, largest, rho), positive and in order")
    churn = tuple(s.churn)
    numbers = len(churn) in (0, 1, 4) and all(type(c) in (int, float) and c >= 0 for c in churn)
    require(numbers, "sample.churn", churn, "empty, (amount,) or (amount, S_min, S_max, S_noise), none negative")
    fits = d.schedule == "edm" and SAMPLERS[s.sampler].churn
    allowed = "empty, but with diffusion.schedule = 'edm' and sample.sampler euler or heun"
    require(not churn or fits, "sample.churn", churn, allowed)


def validate_eval(config: ConfigDict) -> None:
    """The check of the fields `eval`, which --mode=evaluate repeats after its changes."""
    e, s, d = config.eval, config.sample, config.diffusion
    for score in e.scores:
        require(score in SCORES, "eval.scores", score, f"among {', '.join(SCORES)}")
        asks = score == "knn_accuracy" and not config.model.conditional
        require(not asks, "eval.scores", score, "left out with model.conditional = False: no class is asked for")
    _one_of(config, "eval.extractor", tuple(EXTRACTORS))
    _one_of(config, "eval.resize", ("pytorch", "tf1"))
    _one_of(config, "eval.reference", ("val", "train"))
    inception = e.extractor == "inception"
    for field, default in (("inception", ""), ("resize", "pytorch")):
        used = inception or e[field] == default
        require(used, f"eval.{field}", e[field], f"left out with eval.extractor = {e.extractor!r}")
    found = not inception or pathlib.Path(e.inception).is_file()
    require(found, "eval.inception", e.inception, "a file with InceptionV3's weights, .pth or .safetensors")
    _at_least(config, 0, "eval.num", "eval.neighbours", "eval.every", "eval.nll_num")
    _at_least(config, 1, "eval.splits", "eval.k")
    for steps in e.steps:
        last = math.inf if d.schedule in CONTINUOUS else d.num_steps
        whole = type(steps) is int and 1 <= steps <= last
        require(whole, "eval.steps", steps, f"whole numbers in 1..{last} (diffusion.num_steps)")
    fits = not e.nll or d.schedule not in CONTINUOUS
    require(fits, "eval.nll", e.nll, f"False with diffusion.schedule = {d.schedule!r}: the bound is of discrete steps")
    nums = {} if e.images else {"eval.num" if e.num else "sample.num": e.num or s.num}
    nums |= {"eval.every_num": e.every_num} if e.every else {}
    for field, num in nums.items():
        for score in e.scores:
            least = FEATURE_SCORES[score].least(e) if score in FEATURE_SCORES else 1
            require(num >= least, field, num, f"at least {least} for the score {score!r}")
