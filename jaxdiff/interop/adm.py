"""Folders with a UNetModel of openai's guided-diffusion: model.safetensors, and config.json with its arguments."""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdiff.errors import ConfigError
from jaxdiff.interop.diffusers import require_fixed
from jaxdiff.interop.tensors import Names
from jaxdiff.interop.unet2d import OURS, Foreign, class_fields
from jaxdiff.state_dicts import read_safetensors

WEIGHTS = "model.safetensors"
# What our network is, and ADM's own are; use_checkpoint and use_fp16 compute the same.
FIXED = {"dims": 2, "conv_resample": True}
GIVEN = ("in_channels", "model_channels", "num_res_blocks", "out_channels", "channel_mult")
INNER = {
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "emb": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "skip": "skip_connection",
    "proj": "proj_out",
}


def unet_names(levels: int, num_res_blocks: int, attention: list[bool]) -> Names:
    """What guided-diffusion calls the parameters: blocks are counted from input to output, over the levels.

    Args: attention, whether there is some, for each level.
    """
    modules = {
        "time_0": "time_embed.0",
        "time_1": "time_embed.2",
        "class_emb": "label_emb",
        "conv_in": "input_blocks.0.0",
    }
    modules |= {"mid_res0": "middle_block.0", "mid_attn": "middle_block.1", "mid_res1": "middle_block.2"}
    modules |= {"norm_out": "out.0", "conv_out": "out.2"}
    convs, block = {}, 1  # strided convolutions are called op when going down, conv when going up
    for level in range(levels):
        for j in range(num_res_blocks):
            modules[f"down{level}_res{j}"] = f"input_blocks.{block}.0"
            modules[f"down{level}_{j}_attn"] = f"input_blocks.{block}.1"
            block += 1
        modules[f"down{level}_resample"] = f"input_blocks.{block}.0"
        convs[f"down{level}_resample"] = "op"
        block += level < levels - 1
    block = 0
    for level in reversed(range(levels)):
        for j in range(num_res_blocks + 1):
            modules[f"up{level}_res{j}"] = f"output_blocks.{block}.0"
            modules[f"up{level}_{j}_attn"] = f"output_blocks.{block}.1"
            block += 1
        modules[f"up{level}_resample"] = f"output_blocks.{block - 1}.{1 + attention[level]}"

    def names(path: str) -> list[str]:
        module, *inner, leaf = path.removeprefix("params/").split("/")
        own = [convs.get(module, name) if name == "conv" else INNER.get(name, name) for name in inner]
        return [".".join([modules[module], *own, "bias" if leaf == "bias" else "weight"])]

    return names


def read_unet(folder: pathlib.Path, shape: Sequence[int], num_classes: int) -> Foreign:
    """The UNetModel in a folder, for images or latents [h, w, c] and a data set of `num_classes` classes.

    Raises: ConfigError naming what is wrong with the folder, or the option that we do not have.
    """
    where, path = str(folder), folder / "config.json"
    try:
        config: dict[str, Any] = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--from={folder}: must be a folder with a config.json ({error})") from None
    require_fixed(config, FIXED, GIVEN, where)
    for name in ("channel_mult", "attention_resolutions"):  # not as guided-diffusion's flags have them, in a string
        value = config.get(name)
        if not isinstance(value, list) or not all(isinstance(n, int | float) and n > 0 for n in value):
            raise ConfigError(f"--from={where}: {name} = {value!r}: must be a list of numbers, UNetModel's argument")
    channels = shape[-1]
    for name, allowed in (("in_channels", (channels,)), ("out_channels", (channels, 2 * channels))):
        if config[name] not in allowed:
            only = " or ".join(map(str, allowed))
            raise ConfigError(f"--from={where}: {name} = {config[name]} is not supported, only {only}")
    heads, head_dim = config.get("num_heads", 1), config.get("num_head_channels", -1)
    if head_dim == -1 and config.get("num_heads_upsample", -1) not in (-1, heads):
        upsample = config["num_heads_upsample"]
        raise ConfigError(f"--from={where}: num_heads_upsample = {upsample} is not supported, only num_heads = {heads}")
    factors, levels = config["attention_resolutions"], len(config["channel_mult"])
    fields = {
        "name": "unet",
        "channels": config["model_channels"],
        "channel_mult": tuple(config["channel_mult"]),
        "num_res_blocks": config["num_res_blocks"],
        "attention_resolutions": tuple(shape[0] // factor for factor in factors),  # they count the downsampling
        "mid_attention": True,
        "scale_shift_norm": config.get("use_scale_shift_norm", False),
        "resblock_updown": config.get("resblock_updown", False),
        "downsample_padding": 1,
        "norm_groups": 32,
        "norm_eps": 1e-5,
        "freq_shift": 0.0,
        "learned_variance": config["out_channels"] > channels,
        **OURS,
        **({"num_heads": heads} if head_dim == -1 else {"head_dim": head_dim, "num_heads": 0}),
    }
    tensors = read_safetensors(folder / WEIGHTS)
    if not config.get("use_new_attention_order", False):
        for name in filter(re.compile(r".*\.qkv\.(weight|bias)").fullmatch, tensors):
            value = tensors[name]
            count = heads if head_dim == -1 else len(value) // (3 * head_dim)
            # The older order is head, then q, k and v; ours, as the newer one, is q, k and v, each of all heads.
            if count and len(value) % (3 * count) == 0:  # else it is of another network, which is said later
                split = value.reshape(count, 3, -1, *value.shape[1:])
                tensors[name] = np.swapaxes(split, 0, 1).reshape(value.shape)
    names = unet_names(levels, config["num_res_blocks"], [2**level in factors for level in range(levels)])
    ours = class_fields("num_classes", config.get("num_classes"), num_classes, where)
    ours["diffusion.loss"] = "hybrid" if fields["learned_variance"] else "mse"
    return Foreign(ours | {f"model.{name}": value for name, value in fields.items()}, tensors, names)
