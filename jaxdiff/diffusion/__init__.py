"""The maths of diffusion models: arrays in, arrays out; no networks, config or logging."""

from jaxdiff.diffusion.guidance import autoguided, classifier_free, guide, rescale, within
from jaxdiff.diffusion.losses import sample_timesteps, simple_loss
from jaxdiff.diffusion.process import p_mean_variance, predict_eps_from_x0, predict_x0_from_eps, q_posterior, q_sample
from jaxdiff.diffusion.samplers import (
    SAMPLERS,
    Plan,
    denoise_step,
    initial_noise,
    make_plan,
    plan_row,
    sample,
    sample_keys,
    trajectory,
)
from jaxdiff.diffusion.schedules import SCHEDULES, Schedule, extract, make_schedule
from jaxdiff.diffusion.spacing import SPACINGS, sections, timestep_pairs

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "SPACINGS",
    "Plan",
    "Schedule",
    "autoguided",
    "classifier_free",
    "denoise_step",
    "extract",
    "guide",
    "initial_noise",
    "make_plan",
    "make_schedule",
    "p_mean_variance",
    "plan_row",
    "predict_eps_from_x0",
    "predict_x0_from_eps",
    "q_posterior",
    "q_sample",
    "rescale",
    "sample",
    "sample_keys",
    "sample_timesteps",
    "sections",
    "simple_loss",
    "timestep_pairs",
    "trajectory",
    "within",
]
