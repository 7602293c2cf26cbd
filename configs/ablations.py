"""Techniques one by one: each is a base experiment with only the fields changed that are named here.

    python -m jaxdiff.main --config=configs/ablations.py:cosine                  # latent diffusion of digits, on a CPU
    python -m jaxdiff.main --config=configs/ablations.py:flow,ddpm,imagenet100   # NAME,EXPERIMENT,DATASET

EXPERIMENT is ldm_cfg (default) or ddpm, DATASET any of theirs. `base` changes nothing. Results: docs/techniques.md.
"""

import math
import pathlib
import runpy
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jaxdiff.errors import ConfigError

Fields = dict[str, Any]
COSINE: Fields = {"diffusion.schedule": "cosine"}
LEARNED: Fields = {"model.learned_variance": True, "diffusion.loss": "hybrid", "sample.sampler": "ddpm"}
FLOW: Fields = {
    "diffusion.schedule": "flow",
    "diffusion.prediction": "flow",
    "diffusion.time_sampling": "logit_normal",
    "sample.spacing": "even",
    "sample.sampler": "euler",
}


def _global(config: ConfigDict) -> Fields:
    """Attention also at twice the highest resolution that has it, by parts where cuDNN's kernel does not apply."""
    heights, size = config.model.attention_resolutions, config.data.image_size
    if "autoencoder" in config:
        size //= 2 ** (len(config.autoencoder.channel_mult) - 1)
    if max(heights) >= size:
        raise ConfigError(f"{config.name} has attention at all its resolutions: there is no higher one than {size}")
    return {"model.attention_resolutions": (2 * max(heights), *heights), "model.attention_chunk": 256}


def _across(config: ConfigDict) -> Fields:
    """Where there is attention within a level there is also attention to all levels."""
    return {"model.cross_resolution": tuple(config.model.attention_resolutions)}


def _enhanced(config: ConfigDict) -> Fields:
    """Both, but where there is attention at all resolutions already."""
    try:
        return {**_global(config), **_across(config)}
    except ConfigError:
        return _across(config)


def _combined(config: ConfigDict) -> Fields:
    """The study's: schedule, learned variance and attention."""
    return {**COSINE, **LEARNED, **_enhanced(config)}


def _edm(config: ConfigDict) -> Fields:
    """EDM, published for data of deviation 0.5: whitened latents have 1, so that all its sigmas are doubled."""
    fields: Fields = {
        "diffusion.schedule": "edm",
        "diffusion.prediction": "edm",
        "diffusion.time_sampling": "lognormal",
        "sample.spacing": "karras",
        "sample.sampler": "heun",
    }
    if "autoencoder" in config:
        fields |= {"diffusion.sigma_data": 1.0, "diffusion.time_normal": (math.log(2) - 1.2, 1.2)}
        fields |= {"sample.sigmas": (0.004, 160.0, 7.0)}
    return fields


ABLATIONS: dict[str, Fields | Callable[[ConfigDict], Fields]] = {
    "base": {},
    # The techniques of docs/techniques.md.
    "cosine": COSINE,
    "learned_variance": LEARNED,
    "global_attention": _global,
    "cross_resolution": _across,
    "efficient_attention": {"model.attention_chunk": 64, "model.remat": "blocks"},
    "enhanced_attention": _enhanced,
    "combined": _combined,
    # What is predicted, and how its error is weighed.
    "x0": {"diffusion.prediction": "x0"},
    "v": {"diffusion.prediction": "v"},
    "edm": _edm,
    "flow": FLOW,
    "min_snr": {"diffusion.weighting": "min_snr"},
    "v_min_snr": {"diffusion.prediction": "v", "diffusion.weighting": "min_snr"},
    "p2": {"diffusion.weighting": "p2"},
    # Noise levels: the last without signal; more noise, as for a higher resolution; times spread evenly.
    "zero_terminal_snr": {
        "diffusion.zero_terminal_snr": True,
        "diffusion.prediction": "v",
        "sample.spacing": "trailing",
    },
    "noise_shift": {"diffusion.noise_shift": 2.0},
    "stratified": {"diffusion.stratified": True},
    "vlb": {**LEARNED, "diffusion.loss": "vlb", "diffusion.time_sampling": "importance"},
}


def get_config(choice: str = "base") -> ConfigDict:
    """The experiment of `choice`, NAME or NAME,EXPERIMENT or NAME,EXPERIMENT,DATASET; ConfigError for another."""
    given = choice.split(",", 2)
    name, experiment, dataset = [*given, *("base", "ldm_cfg", "digits")[len(given) :]]
    for part, value, allowed in (("NAME", name, ABLATIONS), ("EXPERIMENT", experiment, ("ldm_cfg", "ddpm"))):
        if value not in allowed:
            raise ConfigError(f"--config=...:{choice}: {part} must be one of {', '.join(allowed)}")
    file = pathlib.Path(__file__).with_name(f"{experiment}.py")
    config: ConfigDict = runpy.run_path(str(file))["get_config"](dataset)
    changed = ABLATIONS[name]
    config.update_from_flattened_dict(changed(config) if callable(changed) else changed)
    config.name = f"{config.name}-{name}"
    return config
