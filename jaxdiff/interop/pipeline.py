"""Pipelines of diffusers: a UNet, its noise schedule, and for latents the autoencoder, in one folder."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxdiff.data.latents import Whitening
from jaxdiff.errors import ConfigError
from jaxdiff.interop.diffusers import (
    autoencoder_config,
    autoencoder_names,
    check_vacant,
    require_fixed,
    write_model,
)
from jaxdiff.interop.tensors import export_params
from jaxdiff.interop.unet2d import unet_config, unet_tensors
from jaxdiff.models import AutoencoderKL, Network, UNet
from jaxdiff.state_dicts import Tensors

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SCHEDULE_FIXED = {"thresholding": False, "trained_betas": None}


class Sampler(NamedTuple):
    """What diffusers calls one of our samplers: scheduler, its options, the spacings it has, its pipeline in pixels."""

    kind: str
    options: dict[str, Any]
    spacings: dict[str, str]
    pipeline: str


# DDPMScheduler steps to the next timestep, DDIMScheduler by T // steps down: so their linspace is two spacings of ours.
# Its larger variance is added in a last step from t > 0 as well, where ours ends without noise.
SAMPLERS = {
    "ddim": Sampler(
        "DDIMScheduler",
        {"set_alpha_to_one": True},
        {"leading": "leading", "trailing": "trailing", "linspace": "linspace"},
        "DDIMPipeline",
    ),
    "ddpm": Sampler(
        "DDPMScheduler",
        {"variance_type": "fixed_small"},
        {"leading": "leading", "trailing": "trailing", "adm": "linspace"},
        "DDPMPipeline",
    ),
    "ddpm_large": Sampler(
        "DDPMScheduler",
        {"variance_type": "fixed_large"},
        {"leading": "leading", "adm": "linspace"},
        "DDPMPipeline",
    ),
}


def scheduler_config(config: ConfigDict) -> dict[str, Any]:
    """scheduler_config.json for the noise schedule and sampler of our config; ConfigError when there is no such."""
    d, s = config.diffusion, config.sample
    if s.sampler not in SAMPLERS:
        raise ConfigError(f"config.sample.sampler = {s.sampler!r}: must be one of {', '.join(SAMPLERS)} to export")
    for field, value, known in (
        ("schedule", d.schedule, tuple(SCHEDULES)),
        ("prediction", d.prediction, tuple(PREDICTIONS)),
        ("noise_shift", d.noise_shift, (1.0,)),
    ):
        if value not in known:
            raise ConfigError(f"config.diffusion.{field} = {value!r}: must be {' or '.join(map(str, known))} to export")
    theirs = SAMPLERS[s.sampler]
    if s.spacing not in theirs.spacings:
        allowed = f"must be one of {', '.join(theirs.spacings)} to export {s.sampler} as a {theirs.kind}"
        raise ConfigError(f"config.sample.spacing = {s.spacing!r}: {allowed}")
    return {
        "_class_name": theirs.kind,
        **SCHEDULE_FIXED,
        **theirs.options,
        "prediction_type": PREDICTIONS[d.prediction],
        "rescale_betas_zero_snr": d.zero_terminal_snr,
        "num_train_timesteps": d.num_steps,
        "beta_schedule": SCHEDULES[d.schedule],
        "beta_start": d.beta_start * 1000 / d.num_steps,  # ours are given for 1000 steps
        "beta_end": d.beta_end * 1000 / d.num_steps,
        "clip_sample": s.clip,
        "steps_offset": 0,
        "timestep_spacing": theirs.spacings[s.spacing],
    }


def schedule_fields(folder: pathlib.Path) -> dict[str, Any]:
    """The fields `diffusion` of our config for scheduler_config.json in `folder`; none where there is no such file.

    Raises: ConfigError naming the option that we do not have.
    """
    path = folder / "scheduler_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"--from: {path} is no JSON ({error})") from None
    require_fixed(config, SCHEDULE_FIXED, (), str(folder))
    theirs, steps = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    schedules = {value: name for name, value in SCHEDULES.items()}
    if theirs not in schedules:
        raise ConfigError(f"--from={folder}: beta_schedule = {theirs!r}: must be one of {', '.join(schedules)}")
    predictions = {value: name for name, value in PREDICTIONS.items()}
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in predictions:
        allowed = f"must be one of {', '.join(predictions)}"
        raise ConfigError(f"--from={folder}: prediction_type = {prediction!r}: {allowed}")
    return {
        "diffusion.prediction": predictions[prediction],
        "diffusion.zero_terminal_snr": config.get("rescale_betas_zero_snr", False),
        "diffusion.schedule": schedules[theirs],
        "diffusion.num_steps": steps,
        "diffusion.beta_start": config.get("beta_start", 1e-4) * steps / 1000,
        "diffusion.beta_end": config.get("beta_end", 0.02) * steps / 1000,
    }


def fold_whitening(tensors: Tensors, whitening: Whitening) -> Tensors:
    """An autoencoder's state dict whose latents are the whitened ones of the given: (z - mean) / std, in and out.

    The 1x1 convolutions next to the latents take it up: W' = W / std and b' = (b - mean) / std for the mean,
    b' = b - 2 log std for the log variance; and W' = W std, b' = b + W mean before the decoder. Computed in float64.
    """
    mean, std = (np.asarray(values, np.float64) for values in whitening)
    w, b = (tensors[f"quant_conv.{end}"].astype(np.float64) for end in ("weight", "bias"))
    zeros, ones = np.zeros_like(mean), np.ones_like(std)
    scale = np.concatenate([std, ones])
    quant = {
        "quant_conv.weight": w / scale[:, None, None, None],
        "quant_conv.bias": (b - np.concatenate([mean, zeros])) / scale - 2 * np.log(np.concatenate([ones, std])),
    }
    w, b = (tensors[f"post_quant_conv.{end}"].astype(np.float64) for end in ("weight", "bias"))
    quant |= {
        "post_quant_conv.weight": w * std[None, :, None, None],
        "post_quant_conv.bias": b + w[:, :, 0, 0] @ mean,
    }
    return tensors | {name: value.astype(np.float32) for name, value in quant.items()}


def save_pipeline(
    config: ConfigDict,
    unet: Network,
    params: Any,
    shape: Sequence[int],
    folder: pathlib.Path,
    *,
    autoencoder: tuple[AutoencoderKL, Any, Whitening] | None = None,
) -> None:
    """Write unet/ and scheduler/, and with an `autoencoder` (network, parameters, statistics) of the latents vqvae/.

    For an unconditional model model_index.json as well, so that `diffusers.DiffusionPipeline.from_pretrained` loads the
    folder: diffusers has no pipeline that would ask a UNet2DModel for a class.
    Args: shape [h, w, c], of what the UNet denoises.
    Raises: ConfigError when `folder` exists and is not empty, or naming the field that diffusers cannot express.
    """
    if not isinstance(unet, UNet):
        raise ConfigError(f"config.model.name = {config.model.name!r}: must be 'unet' to export, as a UNet2DModel")
    unet_json, scheduler_json = unet_config(unet, shape[-1], shape[0]), scheduler_config(config)
    parts = {"unet": "UNet2DModel", "scheduler": scheduler_json["_class_name"]}
    pipeline = SAMPLERS[config.sample.sampler].pipeline
    if autoencoder:
        model, weights, whitening = autoencoder
        vae_json = autoencoder_config(model, config.data.image_size)
        vae_json["scaling_factor"] = config.diffusion.scaling_factor or 1.0
        tensors = export_params(weights, autoencoder_names(len(model.channel_mult)))
        if not config.diffusion.scaling_factor:  # of each channel its own, which diffusers does not know
            tensors = fold_whitening(tensors, whitening)
        parts |= {"vqvae": "AutoencoderKL"}
        pipeline = "LDMPipeline"
    check_vacant(folder)
    write_model(folder / "unet", unet_json, unet_tensors(unet, params))
    if autoencoder:
        write_model(folder / "vqvae", vae_json, tensors)
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_json)
    if not unet.num_classes:
        index = {"_class_name": pipeline, **{name: ["diffusers", kind] for name, kind in parts.items()}}
        _write_json(folder / "model_index.json", index)


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
