"""Model folders of diffusers (config.json and safetensors), in and out: AutoencoderKL."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxdiff.errors import ConfigError
from jaxdiff.interop.tensors import Names, export_params, import_params, read_safetensors
from jaxdiff.models import AutoencoderKL

WEIGHTS = "diffusion_pytorch_model.safetensors"
# What our AutoencoderKL is; of other fields of its config any value will do.
AUTOENCODER_FIXED = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
RESNET = {"norm_in": "norm1", "conv_in": "conv1", "norm_out": "norm2", "conv_out": "conv2", "skip": "conv_shortcut"}
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15


def read_config(folder: pathlib.Path, kind: str) -> dict[str, Any]:
    """config.json of a model folder; ConfigError when there is none, or it is of another class than `kind`."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--from={folder}: must be a diffusers folder with a config.json ({error})") from None
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != kind:
        raise ConfigError(f"--from={folder}: its config.json says _class_name = {found!r}; must be {kind!r}")
    return config


def autoencoder_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields `autoencoder` of our config for a config.json; ConfigError naming the option that we do not have."""
    for name, value in AUTOENCODER_FIXED.items():
        if config.get(name, value) != value:
            raise ConfigError(f"--from={where}: {name} = {config[name]!r} is not supported, only {value!r}")
    for name in ("block_out_channels", "layers_per_block", "latent_channels"):
        if not config.get(name):
            raise ConfigError(f"--from={where}: its config.json must give {name}")
    widths = config["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise ConfigError(f"--from={where}: block_out_channels = {widths!r} must be multiples of the first")
    for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if other := set(config.get(name, [block])) - {block}:
            raise ConfigError(f"--from={where}: {name} with {other.pop()!r} are not supported, only {block!r}")
    return {
        "channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": config["layers_per_block"],
        "latent_channels": config["latent_channels"],
        "norm_groups": config.get("norm_num_groups", 32),
    }


def autoencoder_names(levels: int) -> Names:
    """What diffusers calls the parameters of an AutoencoderKL of so many levels."""

    def module(name: str) -> str:
        if match := re.fullmatch(r"down(\d+)_res(\d+)", name):
            return f"down_blocks.{match[1]}.resnets.{match[2]}"
        if match := re.fullmatch(r"up(\d+)_res(\d+)", name):
            return f"up_blocks.{levels - 1 - int(match[1])}.resnets.{match[2]}"
        if match := re.fullmatch(r"down(\d+)_resample", name):
            return f"down_blocks.{match[1]}.downsamplers.0"
        if match := re.fullmatch(r"up(\d+)_resample", name):
            return f"up_blocks.{levels - 1 - int(match[1])}.upsamplers.0"
        if match := re.fullmatch(r"mid_res(\d)", name):
            return f"mid_block.resnets.{match[1]}"
        return {"mid_attn": "mid_block.attentions.0", "norm_out": "conv_norm_out"}.get(name, name)

    def names(path: str) -> list[str]:
        *modules, leaf = path.removeprefix("params/").split("/")
        end = "bias" if leaf == "bias" else "weight"
        if len(modules) == 1:  # quant_conv, post_quant_conv
            return [f"{modules[0]}.{end}"]
        part, block, *inner = modules
        base = f"{part}.{module(block)}"
        if block.endswith("_attn"):
            ends = {"norm": ["group_norm"], "qkv": ["to_q", "to_k", "to_v"], "proj": ["to_out.0"]}[inner[0]]
            return [f"{base}.{name}.{end}" for name in ends]
        return [".".join([base, *(RESNET.get(name, name) if "_res" in block else name for name in inner), end])]

    return names


def load_autoencoder(folder: pathlib.Path) -> tuple[dict[str, Any], Any]:
    """The fields `autoencoder` of our config, and the parameters, of a folder with diffusers' AutoencoderKL.

    Raises: ConfigError naming what is wrong with the folder.
    """
    fields = autoencoder_fields(read_config(folder, "AutoencoderKL"), str(folder))
    pattern = re.compile(r"\.(" + "|".join(OLD_NAMES) + r")\.(?=weight|bias)")
    tensors = {
        pattern.sub(lambda match: f".{OLD_NAMES[match[1]]}.", name): value
        for name, value in read_safetensors(folder / WEIGHTS).items()
    }
    abstract = abstract_autoencoder(AutoencoderKL(**fields))
    return fields, import_params(tensors, abstract, autoencoder_names(len(fields["channel_mult"])), str(folder))


def abstract_autoencoder(model: AutoencoderKL) -> Any:
    """Shapes of an autoencoder's parameters."""
    size = model.downsampling
    image, noise = np.zeros((1, size, size, 3), np.float32), np.zeros((1, 1, 1, model.latent_channels), np.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image, noise)


def save_autoencoder(model: AutoencoderKL, params: Any, sample_size: int, folder: pathlib.Path) -> None:
    """Write a folder that `diffusers.AutoencoderKL.from_pretrained` loads.

    Args: sample_size, image height in pixels.
    Raises: ConfigError when `folder` exists and is not empty, or diffusers has no such GroupNorm.
    """
    widths = [model.channels * mult for mult in model.channel_mult]
    if any(width % model.norm_groups for width in widths):
        raise ConfigError(
            f"config.autoencoder.norm_groups = {model.norm_groups}: diffusers has as many groups at every level, and "
            f"they do not divide the channels {', '.join(map(str, widths))}; train with a divisor of them to export"
        )
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--to={folder}: exists and is not empty; give another")
    levels = len(model.channel_mult)
    config = {
        "_class_name": "AutoencoderKL",
        **AUTOENCODER_FIXED,
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": model.latent_channels,
        "layers_per_block": model.num_res_blocks,
        "norm_num_groups": model.norm_groups,
        "sample_size": sample_size,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(export_params(params, autoencoder_names(levels)), folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
