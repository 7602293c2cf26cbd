"""diffusers' UNet2DModel, in and out."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.errors import ConfigError
from jaxdiff.interop.diffusers import check_groups, model_names, read_config, read_tensors, require_fixed
from jaxdiff.interop.tensors import Names, export_params
from jaxdiff.models import UNet
from jaxdiff.state_dicts import Tensors

# What our network is; of other fields of a config any value will do.
FIXED = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
}
# Whether a block of this type has attention, and whether residual blocks resample it (None: as the config says).
BLOCKS = {
    "DownBlock2D": (False, False),
    "ResnetDownsampleBlock2D": (False, True),
    "AttnDownBlock2D": (True, None),
    "UpBlock2D": (False, False),
    "ResnetUpsampleBlock2D": (False, True),
    "AttnUpBlock2D": (True, None),
}
# What no other project's UNet has: fields of our config, and the values without.
OURS: dict[str, Any] = {"cross_resolution": (), "qk_norm": False}


class Foreign(NamedTuple):
    """A UNet as found: the fields of our config that make such a network, its tensors and what they are called."""

    fields: dict[str, Any]
    tensors: Tensors
    names: Names


def unet_fields(config: Mapping[str, Any], shape: Sequence[int], num_classes: int, where: str) -> dict[str, Any]:
    """The fields of our config for a UNet2DModel's config.json.

    Args: shape [h, w, c], of what the network is to be used on; num_classes, of the data set.
    Raises: ConfigError naming the option that we do not have.
    """
    given = ("block_out_channels", "layers_per_block", "down_block_types", "up_block_types")
    require_fixed(config, FIXED, given, where)
    for name in ("in_channels", "out_channels"):
        if config.get(name, 3) != shape[-1]:
            raise ConfigError(f"--from={where}: {name} = {config.get(name, 3)!r} is not supported, only {shape[-1]}")
    widths, levels = config["block_out_channels"], len(config["block_out_channels"])
    attention, resnet = _blocks(config, where)
    groups, scale_shift = config.get("norm_num_groups", 32), _scale_shift(config, where)
    wanted = config.get("attn_norm_num_groups") or (None if scale_shift else groups)
    if config.get("add_attention", True) and wanted != groups:
        raise ConfigError(f"--from={where}: attn_norm_num_groups = {wanted!r} is not supported, only {groups!r}")
    head_dim = config.get("attention_head_dim", 8)
    fields: dict[str, Any] = {
        "name": "unet",
        "channels": widths[0],
        "channel_mult": tuple(w / widths[0] if w % widths[0] else w // widths[0] for w in widths),
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": tuple(shape[0] // 2**level for level in range(levels) if attention[level]),
        "mid_attention": config.get("add_attention", True),
        "scale_shift_norm": scale_shift,
        "resblock_updown": resnet,
        "downsample_padding": config.get("downsample_padding", 1),
        "norm_groups": groups,
        "norm_eps": config.get("norm_eps", 1e-5),
        "freq_shift": float(config.get("freq_shift", 0)),
        "learned_variance": False,
        **OURS,
        **({"num_heads": 1} if head_dim is None else {"head_dim": head_dim, "num_heads": 0}),
    }
    return class_fields("num_class_embeds", config.get("num_class_embeds"), num_classes, where) | {
        f"model.{name}": value for name, value in fields.items()
    }


def class_fields(option: str, rows: int | None, num_classes: int, where: str) -> dict[str, Any]:
    """The fields of our config for a class table of `rows` rows, or None without one, on a data set of `num_classes`.

    Raises: ConfigError naming `option` when the table is neither of these classes nor of these and the null class.
    """
    if rows is not None and rows not in (num_classes, num_classes + 1):
        allowed = f"must be {num_classes} or, with a null class, {num_classes + 1}, as the data set has classes"
        raise ConfigError(f"--from={where}: {option} = {rows}: {allowed}")
    fields: dict[str, Any] = {"model.conditional": rows is not None, "model.context_tokens": 0}
    if rows is not None:
        fields["model.null_class"] = rows > num_classes
    if rows is None or rows == num_classes:
        fields |= {"diffusion.label_dropout": 0.0, "sample.guidance": 0.0}
    return fields


def _blocks(config: Mapping[str, Any], where: str) -> tuple[list[bool], bool]:
    """Which levels have attention, and whether residual blocks resample."""
    attention, resnet = [], set()
    for side, unsampled in (("down", -1), ("up", 0)):
        option = f"{side}_block_types"
        types = [name.removeprefix("UNetRes") for name in config[option]]
        for name in types:
            if name not in BLOCKS or side not in name.lower():
                raise ConfigError(f"--from={where}: {option} with {name!r} are not supported")
        types = types if side == "down" else types[::-1]
        if len(types) != len(config["block_out_channels"]):
            raise ConfigError(f"--from={where}: {option} = {config[option]!r}: must be as many as block_out_channels")
        attention.append([BLOCKS[name][0] for name in types])
        default = config.get(f"{side}sample_type", "conv") == "resnet"
        del types[unsampled]
        resnet |= {default if (own := BLOCKS[name][1]) is None else own for name in types}
    if attention[0] != attention[1] or len(resnet) > 1:
        what = "attention at other levels" if attention[0] != attention[1] else "other resampling at some levels"
        raise ConfigError(f"--from={where}: up_block_types = {config['up_block_types']!r}: {what} is not supported")
    return attention[0], not resnet or resnet.pop()


def _scale_shift(config: Mapping[str, Any], where: str) -> bool:
    value = config.get("resnet_time_scale_shift", "default")
    if value not in ("default", "scale_shift"):
        raise ConfigError(f"--from={where}: resnet_time_scale_shift = {value!r} is not supported")
    return value == "scale_shift"


def read_unet(folder: pathlib.Path, shape: Sequence[int], num_classes: int) -> Foreign:
    """The UNet2DModel in a folder; arguments and errors as in `unet_fields`."""
    config = read_config(folder, "UNet2DModel")
    fields = unet_fields(config, shape, num_classes, str(folder))
    tensors, first = read_tensors(folder), "time_embedding.linear_1.weight"
    if not config.get("flip_sin_to_cos", True) and first in tensors:  # ours is in the order cos, sin
        half = tensors[first].shape[-1] // 2
        tensors[first] = np.concatenate([tensors[first][..., half:], tensors[first][..., :half]], axis=-1)
    return Foreign(fields, tensors, model_names(len(fields["model.channel_mult"])))


def unet_config(model: UNet, channels: int, size: int) -> dict[str, Any]:
    """config.json of a UNet for arrays [size, size, channels].

    Raises: ConfigError naming the field of our config that diffusers cannot express.
    """
    if model.context_tokens:
        raise ConfigError(
            f"config.model.context_tokens = {model.context_tokens}: diffusers' UNet2DModel has no cross-attention; "
            "train with 0 to export"
        )
    for name, value in OURS.items():
        if (own := getattr(model, name)) != value:
            raise ConfigError(
                f"config.model.{name} = {own!r}: diffusers has no such attention; train with {value!r} to export"
            )
    if model.out_channels != channels:
        raise ConfigError("config.model.learned_variance = True: must be False to export; diffusers' pipelines use eps")
    widths = [round(model.channels * mult) for mult in model.channel_mult]
    check_groups("model", model.norm_groups, widths)
    attention = [size // 2**level in model.attention_resolutions for level in range(len(widths))]
    attended = {w for w, there in zip(widths, attention, strict=True) if there}
    attended |= {widths[-1]} if model.mid_attention else set()
    if model.num_heads > 1 and len(attended) > 1:
        raise ConfigError(
            f"config.model.num_heads = {model.num_heads}: diffusers has as many channels a head at every level, and "
            f"there is attention over {', '.join(map(str, sorted(attended)))} channels; use head_dim to export"
        )
    head_dim = attended.pop() // model.num_heads if model.num_heads > 1 and attended else model.head_dim
    kinds = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if model.resblock_updown else ("DownBlock2D", "UpBlock2D")
    )
    resampling = "resnet" if model.resblock_updown else "conv"
    return {
        "_class_name": "UNet2DModel",
        **FIXED,
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": model.num_res_blocks,
        "down_block_types": ["AttnDownBlock2D" if there else kinds[0] for there in attention],
        "up_block_types": ["AttnUpBlock2D" if there else kinds[1] for there in attention[::-1]],
        "downsample_type": resampling,
        "upsample_type": resampling,
        "downsample_padding": model.downsample_padding,
        "add_attention": model.mid_attention,
        "attention_head_dim": None if model.num_heads == 1 else head_dim,
        "attn_norm_num_groups": model.norm_groups,
        "norm_num_groups": model.norm_groups,
        "norm_eps": model.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if model.scale_shift_norm else "default",
        "freq_shift": model.freq_shift,
        "flip_sin_to_cos": True,
        "num_class_embeds": model.num_classes + model.null_class if model.num_classes else None,
        "dropout": model.dropout,
    }


def unet_tensors(model: UNet, params: Any) -> Tensors:
    """The state dict of a UNet, by diffusers' names."""
    return export_params(params, model_names(len(model.channel_mult)))
