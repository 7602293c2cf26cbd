"""Model folders of diffusers (config.json and safetensors), in and out: what is common, and AutoencoderKL."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxdiff.errors import ConfigError
from jaxdiff.interop.tensors import Names, export_params, import_params
from jaxdiff.models import AutoencoderKL, forms
from jaxdiff.state_dicts import Tensors, read_safetensors

WEIGHTS = "diffusion_pytorch_model.safetensors"
# What our networks are; of other fields of a config any value will do.
AUTOENCODER_FIXED = {
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}  # with Attn before, or not
INNER = {
    "norm_in": ["norm1"],
    "conv_in": ["conv1"],
    "emb": ["time_emb_proj"],
    "norm_out": ["norm2"],
    "conv_out": ["conv2"],
    "skip": ["conv_shortcut"],
    "norm": ["group_norm"],
    "qkv": ["to_q", "to_k", "to_v"],
    "proj": ["to_out.0"],
}
OUTER = {
    "norm_out": "conv_norm_out",
    "mid_attn": "mid_block.attentions.0",
    "time_0": "time_embedding.linear_1",
    "time_1": "time_embedding.linear_2",
    "class_emb": "class_embedding",
}
PARTS = {"res": "resnets.{}", "attn": "attentions.{}", "down": "downsamplers.0", "up": "upsamplers.0"}
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


def require_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any], given: Sequence[str], where: str) -> None:
    """ConfigError naming an option of `config` that has another value than in `fixed`, or one of `given` it lacks."""
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ConfigError(f"--from={where}: {name} = {config[name]!r} is not supported, only {value!r}")
    for name in given:
        if not config.get(name):
            raise ConfigError(f"--from={where}: its config.json must give {name}")


def read_tensors(folder: pathlib.Path) -> Tensors:
    """The tensors of a model folder, by the names of today."""
    pattern = re.compile(r"\.(" + "|".join(OLD_NAMES) + r")\.(?=weight|bias)")
    tensors = read_safetensors(folder / WEIGHTS)
    return {pattern.sub(lambda match: f".{OLD_NAMES[match[1]]}.", name): value for name, value in tensors.items()}


def check_vacant(folder: pathlib.Path) -> None:
    """ConfigError when the folder to write is there and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--to={folder}: exists and is not empty; give another")


def write_model(folder: pathlib.Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Write a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def module_name(name: str, levels: int) -> str:
    """What diffusers calls our module `name`, such as up0_res1, of a network of so many levels."""
    if match := re.fullmatch(r"mid_res(\d)", name):
        return f"mid_block.resnets.{match[1]}"
    # down0_res1, down0_1_attn, down0_resample
    if match := re.fullmatch(r"(down|up)(\d+)_(?:res(\d+)|(\d+)_attn|resample)", name):
        side, level, res, attention = match.groups()
        at = int(level) if side == "down" else levels - 1 - int(level)
        part = PARTS["res" if res else "attn" if attention else side].format(res or attention)
        return f"{side}_blocks.{at}.{part}"
    return OUTER.get(name, name)


def model_names(levels: int, parts: Sequence[str] = ()) -> Names:
    """What diffusers calls the parameters of a network of so many levels, which may consist of several `parts`."""

    def names(path: str) -> list[str]:
        *modules, leaf = path.removeprefix("params/").split("/")
        end = "bias" if leaf == "bias" else "weight"
        prefix = [modules.pop(0)] if modules[0] in parts else []
        module, *inner = modules
        ends = INNER.get(inner[0], inner) if inner else [""]
        return [".".join(filter(None, [*prefix, module_name(module, levels), name, end])) for name in ends]

    return names


def autoencoder_names(levels: int) -> Names:
    """What diffusers calls the parameters of an AutoencoderKL of so many levels."""
    return model_names(levels, ("encoder", "decoder"))


def autoencoder_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields `autoencoder` of our config for a config.json; ConfigError naming the option that we do not have."""
    require_fixed(config, AUTOENCODER_FIXED, ("block_out_channels", "layers_per_block", "latent_channels"), where)
    widths = config["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise ConfigError(f"--from={where}: block_out_channels = {widths!r} must be multiples of the first")
    levels = []
    for name, block in BLOCKS.items():
        types = config.get(name, [block] * len(widths))
        if other := set(types) - {block, f"Attn{block}"}:
            found = other.pop()
            raise ConfigError(
                f"--from={where}: {name} with {found!r} are not supported, only {block!r} and 'Attn{block}'"
            )
        levels.append([i for i, kind in enumerate(types[:: 1 if name == "down_block_types" else -1]) if kind != block])
    if levels[0] != levels[1]:
        raise ConfigError(f"--from={where}: down_block_types and up_block_types must have attention at the same levels")
    return {
        "channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": config["layers_per_block"],
        "attention_levels": tuple(levels[0]),
        "latent_channels": config["latent_channels"],
        "norm_groups": config.get("norm_num_groups", 32),
    }


def load_autoencoder(folder: pathlib.Path) -> tuple[dict[str, Any], Any]:
    """The fields `autoencoder` of our config, and the parameters, of a folder with diffusers' AutoencoderKL.

    Raises: ConfigError naming what is wrong with the folder.
    """
    fields = autoencoder_fields(read_config(folder, "AutoencoderKL"), str(folder))
    abstract, names = abstract_autoencoder(AutoencoderKL(**fields)), autoencoder_names(len(fields["channel_mult"]))
    return fields, import_params(read_tensors(folder), abstract, names, str(folder))


def abstract_autoencoder(model: AutoencoderKL) -> Any:
    """Shapes of an autoencoder's parameters."""
    size = model.downsampling
    image, noise = np.zeros((1, size, size, 3), np.float32), np.zeros((1, 1, 1, model.latent_channels), np.float32)
    return forms.abstract_init(model, image, noise)


def autoencoder_config(model: AutoencoderKL, sample_size: int) -> dict[str, Any]:
    """config.json of an autoencoder; ConfigError when diffusers has no such GroupNorm."""
    widths = [model.channels * mult for mult in model.channel_mult]
    check_groups("autoencoder", model.norm_groups, widths)
    attn = ["Attn" if level in model.attention_levels else "" for level in range(len(widths))]
    types = {name: [f"{a}{block}" for a in attn] for name, block in BLOCKS.items()}
    types["up_block_types"].reverse()
    return {
        "_class_name": "AutoencoderKL",
        **AUTOENCODER_FIXED,
        "block_out_channels": widths,
        **types,
        "latent_channels": model.latent_channels,
        "layers_per_block": model.num_res_blocks,
        "norm_num_groups": model.norm_groups,
        "sample_size": sample_size,
    }


def save_autoencoder(model: AutoencoderKL, params: Any, sample_size: int, folder: pathlib.Path) -> None:
    """Write a folder that `diffusers.AutoencoderKL.from_pretrained` loads.

    Args: sample_size, image height in pixels.
    Raises: ConfigError when `folder` exists and is not empty, or diffusers has no such GroupNorm.
    """
    config = autoencoder_config(model, sample_size)
    check_vacant(folder)
    write_model(folder, config, export_params(params, autoencoder_names(len(model.channel_mult))))


def check_groups(group: str, groups: int, widths: Sequence[int]) -> None:
    """ConfigError unless config.<group>.norm_groups, `groups`, divides all of the channels `widths`."""
    if any(width % groups for width in widths):
        raise ConfigError(
            f"config.{group}.norm_groups = {groups}: diffusers has as many groups at every level, and "
            f"they do not divide the channels {', '.join(map(str, widths))}; train with a divisor of them to export"
        )
