"""Techniques that contradict each other are one line that names both fields."""

import pytest

from configs import ddpm
from jaxdiff.config import check
from jaxdiff.errors import ConfigError

EDM = {
    "diffusion.schedule": "edm",
    "diffusion.prediction": "edm",
    "diffusion.time_sampling": "lognormal",
    "sample.spacing": "karras",
    "sample.sampler": "heun",
}
FLOW = {
    "diffusion.schedule": "flow",
    "diffusion.prediction": "flow",
    "sample.spacing": "even",
    "sample.sampler": "euler",
}
ZERO = {"diffusion.zero_terminal_snr": True, "diffusion.prediction": "v", "sample.spacing": "trailing"}
COSINE = {"diffusion.schedule": "cosine", "sample.clip": False, "sample.spacing": "leading"}
FLOW_X0 = {**FLOW, "diffusion.prediction": "x0"}
LEARNED = {"model.learned_variance": True, "diffusion.loss": "hybrid"}


@pytest.mark.parametrize(
    "change",
    [
        {**COSINE, "sample.spacing": "trailing", "diffusion.prediction": "v"},
        {**COSINE, "sample.spacing": "trailing", "sample.clip": True},
        {**COSINE, "sample.spacing": "trailing", "diffusion.schedule": "linear"},
        *({"sample.steps": steps, "sample.spacing": "leading"} for steps in (4, 10, 30, 50, 250, 500, 1000)),
        {"sample.steps": 501, "sample.spacing": "trailing"},
        {**FLOW_X0, "diffusion.weighting": "edm", "diffusion.time_sampling": "logit_normal"},
    ],
)
def test_what_goes_together(change):
    config = ddpm.get_config("digits")
    config.update_from_flattened_dict(change)
    check.validate(config, 8)


@pytest.mark.parametrize(
    ("possible", "change", "words"),
    [
        (ZERO, {"diffusion.prediction": "eps"}, "prediction = 'eps': .* with diffusion.zero_terminal_snr"),
        (ZERO, {"diffusion.weighting": "p2"}, "weighting = 'p2': must be simple with diffusion.zero_terminal_snr"),
        (ZERO, {"sample.spacing": "leading"}, "spacing = 'leading': .*trailing.* with diffusion.zero_terminal_snr"),
        (COSINE, {"sample.spacing": "trailing"}, "spacing = 'trailing': must be leading with .* 316 times as strong"),
        (
            COSINE,
            {"sample.spacing": "dpm", "sample.sampler": "dpmpp_2m"},
            "'dpm': must be leading with .*v has no such",
        ),
        (
            {"sample.spacing": "leading"},
            {"sample.steps": 501},
            "steps = 501: must be such that .*'leading' begins near .*, not at t = 500: a divisor",
        ),
        (
            {},
            {"sample.spacing": "dpm", "sample.steps": 1000},
            "sample.steps = 1000: must be less than 1000 with sample.sp",
        ),
        (
            {},
            {"diffusion.num_steps": 20, "sample.steps": 10},
            "config.diffusion.num_steps = 20: the linear betas reach 1",
        ),
        (FLOW_X0, {"diffusion.weighting": "edm"}, "weighting = 'edm': must be simple with .*'flow' and .*'uniform'"),
        (LEARNED, {"diffusion.loss": "mse"}, "loss = 'mse': must be hybrid or vlb with model.learned_variance = True"),
        (LEARNED, {"diffusion.weighting": "min_snr"}, "weighting = 'min_snr': .*simple with diffusion.loss = 'hybrid'"),
        (LEARNED, {"diffusion.time_sampling": "importance"}, "'importance': must be uniform with .*loss = 'hybrid'"),
        (LEARNED, {"sample.sampler": "dpmpp_2m", "sample.spacing": "linspace"}, "'linspace': .*sampler = 'dpmpp_2m'"),
        (EDM, {"sample.spacing": "leading"}, "spacing = 'leading': must be karras with diffusion.schedule = 'edm'"),
        (EDM, {"diffusion.noise_shift": 2.0}, "noise_shift = 2.0: must be 1 with diffusion.schedule = 'edm'"),
        (EDM, {"diffusion.time_sampling": "uniform"}, "'uniform': must be lognormal with diffusion.schedule = 'edm'"),
        (EDM, {"diffusion.zero_terminal_snr": True}, "zero_terminal_snr = True: must be False with .* 'edm'"),
        (EDM, {"sample.sampler": "unipc", "sample.churn": (1.0,)}, "churn = .* sample.sampler euler or heun"),
        (EDM, LEARNED, "diffusion.loss = 'hybrid': must be mse with diffusion.schedule = 'edm'"),
        (EDM, {"diffusion.weighting": "min_snr"}, "'min_snr': must be simple with .*prediction = 'edm'; .*eps, x0, v"),
        (EDM, {"eval.nll": True}, "eval.nll = True: must be False with diffusion.schedule = 'edm'"),
        (FLOW, {"diffusion.prediction": "eps"}, "prediction = 'eps': must be x0, v, flow or edm with .*'flow'"),
        (FLOW, {"diffusion.time_sampling": "importance"}, "'importance': must be uniform or logit_normal"),
        (FLOW, {"sample.guidance": 1.0, "sample.guidance_interval": (0.0, 1.5)}, r"interval = .* in 0\.\.1"),
    ],
)
def test_techniques_that_contradict_each_other(possible, change, words):
    config = ddpm.get_config("digits")
    config.update_from_flattened_dict(possible)
    check.validate(config, 8)
    config.update_from_flattened_dict(change)
    with pytest.raises(ConfigError, match=words) as error:
        check.validate(config, 8)
    assert "\n" not in str(error.value)


def test_steps_of_an_evaluation_begin_near_the_noisiest_timestep_too():
    config = ddpm.get_config("digits")
    config.sample.spacing = "leading"
    config.eval.steps = (50, 334)
    with pytest.raises(ConfigError, match=r"config.eval.steps = 334: must be such that .*, not at t = 666: a divisor"):
        check.validate_eval(config)
    config.eval.steps = (50, 250)
    check.validate_eval(config)
