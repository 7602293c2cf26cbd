"""The maths of diffusion models: arrays in, arrays out; no networks, config or logging."""

from jaxdiff.diffusion.continuous import Edm, Flow
from jaxdiff.diffusion.guidance import autoguided, classifier_free, guide, rescale, within
from jaxdiff.diffusion.loop import Output, State, begin, denoise_step, initial_noise, sample, sample_keys, trajectory
from jaxdiff.diffusion.losses import WEIGHTINGS, squared_error, weight_of
from jaxdiff.diffusion.plan import Churn, Plan, Process, Row, evaluations_together, make_plan, plan_row
from jaxdiff.diffusion.predictions import PREDICTIONS, Target, to_eps, to_target, to_x0
from jaxdiff.diffusion.process import learned_fraction, p_mean_variance, q_posterior, q_sample
from jaxdiff.diffusion.samplers import SAMPLERS
from jaxdiff.diffusion.schedules import SCHEDULES, Schedule, extract, make_schedule
from jaxdiff.diffusion.spacing import SPACINGS, sections, timestep_pairs
from jaxdiff.diffusion.times import (
    TIMES,
    LossHistory,
    new_history,
    remember,
    sample_important,
    sample_timesteps,
    sample_unit,
)
from jaxdiff.diffusion.variational import Likelihood, likelihood_bound, prior_bits, vlb_term

__all__ = [
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "SPACINGS",
    "TIMES",
    "WEIGHTINGS",
    "Churn",
    "Edm",
    "Flow",
    "Likelihood",
    "LossHistory",
    "Output",
    "Plan",
    "Process",
    "Row",
    "Schedule",
    "State",
    "Target",
    "autoguided",
    "begin",
    "classifier_free",
    "denoise_step",
    "evaluations_together",
    "extract",
    "guide",
    "initial_noise",
    "learned_fraction",
    "likelihood_bound",
    "make_plan",
    "make_schedule",
    "new_history",
    "p_mean_variance",
    "plan_row",
    "prior_bits",
    "q_posterior",
    "q_sample",
    "remember",
    "rescale",
    "sample",
    "sample_important",
    "sample_keys",
    "sample_timesteps",
    "sample_unit",
    "sections",
    "squared_error",
    "timestep_pairs",
    "to_eps",
    "to_target",
    "to_x0",
    "trajectory",
    "vlb_term",
    "weight_of",
    "within",
]
