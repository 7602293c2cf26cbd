"""The check of the fields `diffusion`, and of the steps of samplers, which have to fit to them."""

import contextlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from jaxdiff.build import build_plan, build_process
from jaxdiff.config.require import at_least, one_of, require
from jaxdiff.diffusion import PREDICTIONS, SAMPLERS, SCHEDULES, SPACINGS, TIMES, WEIGHTINGS
from jaxdiff.errors import ConfigError

CONTINUOUS = {"edm": "karras", "flow": "even"}  # schedules without steps of their own, and how samplers step there
GROWTH = 50  # of the signal in a sampler's first step, without clipping: 630 with cosine, 50 steps; 1 with linear
LOSSES = ("mse", "hybrid", "vlb")


def validate_diffusion(config: ConfigDict) -> None:
    """ConfigError for what is impossible in the fields `diffusion`, or contradicts another."""
    d = config.diffusion
    one_of(config, "diffusion.schedule", (*SCHEDULES, *CONTINUOUS))
    at_least(config, 2, "diffusion.num_steps")
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
    with _fields_of_a_config():
        build_process(config)


def _validate_prediction(config: ConfigDict) -> None:
    d = config.diffusion
    one_of(config, "diffusion.prediction", tuple(PREDICTIONS))
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
    one_of(config, "diffusion.loss", LOSSES)
    bound = d.loss != "mse"
    allowed = "hybrid or vlb with model.learned_variance = True, whose variance it would not train"
    require(bound or not learned, "diffusion.loss", d.loss, allowed)
    allowed = "mse with model.learned_variance = False: the network has no output channels for a variance"
    require(learned or not bound, "diffusion.loss", d.loss, allowed)
    allowed = f"mse with diffusion.schedule = {d.schedule!r}: the bound is of discrete steps"
    require(not (bound and d.schedule in CONTINUOUS), "diffusion.loss", d.loss, allowed)
    one_of(config, "diffusion.weighting", tuple(WEIGHTINGS))
    known = WEIGHTINGS[d.weighting].predictions
    allowed = f"simple with diffusion.prediction = {d.prediction!r}; {d.weighting} is defined for {', '.join(known)}"
    require(d.prediction in known, "diffusion.weighting", d.weighting, allowed)
    allowed = f"simple with diffusion.loss = {d.loss!r}, which has weights of its own"
    require(d.weighting == "simple" or not bound, "diffusion.weighting", d.weighting, allowed)
    allowed = f"simple with diffusion.zero_terminal_snr: where sampling begins {d.weighting} weighs nothing"
    fits = not d.zero_terminal_snr or d.weighting not in ("min_snr", "p2")
    require(fits, "diffusion.weighting", d.weighting, allowed)
    # Elsewhere a share of almost nothing of the times, next to the images, has almost all of the weight.
    allowed = "simple with diffusion.schedule = 'flow' and diffusion.time_sampling = 'uniform'"
    fits = (d.weighting, d.prediction, d.schedule, d.time_sampling) != ("edm", "x0", "flow", "uniform")
    require(fits, "diffusion.weighting", d.weighting, allowed)
    at_least(config, 0, "diffusion.weighting_gamma")
    used = not d.weighting_gamma or d.weighting in ("min_snr", "p2")
    allowed = f"0 with diffusion.weighting = {d.weighting!r}"
    require(used, "diffusion.weighting_gamma", d.weighting_gamma, allowed)


def _validate_times(config: ConfigDict) -> None:
    d = config.diffusion
    one_of(config, "diffusion.time_sampling", (*TIMES, "importance"))
    times = {"edm": ("lognormal",), "flow": ("uniform", "logit_normal")}.get(d.schedule, ("uniform", "importance"))
    allowed = f"{' or '.join(times)} with diffusion.schedule = {d.schedule!r}"
    require(d.time_sampling in times, "diffusion.time_sampling", d.time_sampling, allowed)
    allowed = f"uniform with diffusion.loss = {d.loss!r}; importance is for vlb"
    require(d.time_sampling != "importance" or d.loss == "vlb", "diffusion.time_sampling", d.time_sampling, allowed)
    normal = tuple(d.time_normal)
    fits = len(normal) == 2 and normal[1] > 0 and d.time_sampling in ("lognormal", "logit_normal")
    allowed = "empty, or with diffusion.time_sampling lognormal and logit_normal (mean, positive deviation)"
    require(not normal or fits, "diffusion.time_normal", normal, allowed)


def validate_steps(config: ConfigDict) -> None:
    """ConfigError for a sampler, or timesteps of it, that do not go together or with the forward process."""
    one_of(config, "sample.sampler", tuple(SAMPLERS))
    s, d = config.sample, config.diffusion
    own = CONTINUOUS.get(d.schedule, "")
    one_of(config, "sample.spacing", (*SPACINGS, *CONTINUOUS.values()))
    allowed = f"{own or 'one of ' + ', '.join(SPACINGS)} with diffusion.schedule = {d.schedule!r}"
    require(s.spacing == own if own else s.spacing in SPACINGS, "sample.spacing", s.spacing, allowed)
    allowed = "trailing, linspace, adm or dpm with diffusion.zero_terminal_snr: the first step must be from pure noise"
    require(not d.zero_terminal_snr or s.spacing != "leading", "sample.spacing", s.spacing, allowed)
    allowed = f"another with sample.sampler = {s.sampler!r}: its steps do not follow on each other"
    require(s.spacing != "linspace" or not SAMPLERS[s.sampler].multistep, "sample.spacing", s.spacing, allowed)
    if own:
        at_least(config, 1, "sample.steps")
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
    validate_start(config, "sample.steps", s.steps)


def validate_start(config: ConfigDict, field: str, steps: int) -> None:
    """ConfigError where so many steps, which `field` asks for, have no plan, or one that begins badly."""
    s, d = config.sample, config.diffusion
    with _fields_of_a_config():
        build_plan(config, ConfigDict({**s.to_dict(), "steps": steps}))
    if d.schedule in CONTINUOUS:
        return
    now, after = build_process(config, s).pairs(s.spacing, steps)
    lost = d.num_steps - steps * (d.num_steps // steps)
    fits = s.spacing != "leading" or (steps > 1 and lost <= d.num_steps / 10)
    allowed = f"such that sample.spacing = 'leading' begins near the noisiest timestep, not at t = {now[0, 0]:.0f}: "
    allowed += f"a divisor of diffusion.num_steps = {d.num_steps}; trailing and adm take any"
    require(fits, field, steps, allowed)
    growth = after[0, 1] / now[0, 1] if d.prediction == "eps" and not s.clip else 1
    allowed = f"leading with diffusion.prediction = 'eps' and sample.clip = False: the first step of {steps} makes the "
    allowed += f"signal {growth:.0f} times as strong, and with it what is wrong with the prediction; v has no such step"
    require(growth <= GROWTH, "sample.spacing", s.spacing, allowed)


@contextlib.contextmanager
def _fields_of_a_config() -> Iterator[None]:
    """Errors of `jaxdiff.diffusion`, which begin with a field's name, as those of this check."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"config.{error}") from None
