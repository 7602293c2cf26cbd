"""From config fields to networks and schedules: the one place where their names meet."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxdiff.diffusion import Churn, Edm, Flow, Plan, Process, make_plan, make_schedule
from jaxdiff.models import AutoencoderKL, DiT, Network, UNet, forms
from jaxdiff.models.dit import DITS

# The fields `autoencoder` that make the network; the others are of its loss.
ARCHITECTURE = ("channels", "channel_mult", "num_res_blocks", "attention_levels", "latent_channels", "norm_groups")
# The fields `model` of all networks; the others are the UNet's alone.
COMMON = (
    *("name", "conditional", "null_class", "dropout", "learned_variance"),
    *("qk_norm", "attention_chunk", "remat"),
)


def compute_dtype(config: ConfigDict) -> Any:
    """`config.dtype`, where auto is bfloat16 on a GPU and float32 elsewhere."""
    if config.dtype == "auto":
        return jnp.bfloat16 if forms.for_gpu() else jnp.float32
    return jnp.dtype(config.dtype)


def build_autoencoder(config: ConfigDict) -> AutoencoderKL:
    """The network of `config.autoencoder`."""
    return AutoencoderKL(**{name: config.autoencoder[name] for name in ARCHITECTURE}, dtype=compute_dtype(config))


def build_network(config: ConfigDict, channels: int, num_classes: int) -> Network:
    """The network of `config.model` for arrays of `channels` channels and labels of `num_classes` classes.

    With `learned_variance` its output is the prediction, and a second array of that shape for the variance.
    """
    m = config.model
    common = {
        "out_channels": 2 * channels if m.learned_variance else channels,
        "num_classes": num_classes if m.conditional else 0,
        "null_class": m.null_class,
        "dropout": m.dropout,
        "qk_norm": m.qk_norm,
        "attention_chunk": m.attention_chunk,
        "remat": m.remat,
        "dtype": compute_dtype(config),
    }
    return NETWORKS[m.name](m, common)


def _unet(m: ConfigDict, common: dict[str, Any]) -> UNet:
    return UNet(
        **common,
        channels=m.channels,
        channel_mult=tuple(m.channel_mult),
        num_res_blocks=m.num_res_blocks,
        attention_resolutions=tuple(m.attention_resolutions),
        head_dim=m.head_dim,
        num_heads=m.num_heads,
        context_tokens=m.context_tokens,
        scale_shift_norm=m.scale_shift_norm,
        resblock_updown=m.resblock_updown,
        downsample_padding=m.downsample_padding,
        mid_attention=m.mid_attention,
        norm_groups=m.norm_groups,
        norm_eps=m.norm_eps,
        freq_shift=m.freq_shift,
        cross_resolution=tuple(m.cross_resolution),
    )


def _dit(m: ConfigDict, common: dict[str, Any]) -> DiT:
    return DiT(**common, **DITS[m.name])


# By `model.name`: the fields `model`, and what all networks take from them -> the network.
NETWORKS: dict[str, Callable[[ConfigDict, dict[str, Any]], Network]] = {"unet": _unet, **dict.fromkeys(DITS, _dit)}


def build_process(config: ConfigDict, settings: ConfigDict | None = None) -> Process:
    """The forward process of `config.diffusion`; its sampled range, where it has one, is that of the fields `sample` in
    `settings` (default: the config's)."""
    d = config.diffusion
    if d.schedule == "edm":
        return Edm(*(settings or config.sample).sigmas)
    if d.schedule == "flow":
        return Flow(d.noise_shift)
    return make_schedule(
        d.schedule,
        d.num_steps,
        beta_start=d.beta_start,
        beta_end=d.beta_end,
        noise_shift=d.noise_shift,
        zero_terminal_snr=d.zero_terminal_snr,
    )


def build_plan(config: ConfigDict, settings: ConfigDict) -> Plan:
    """The sampler's plan that the fields `sample` in `settings` ask of a network of `config`."""
    d, s = config.diffusion, settings
    return make_plan(
        build_process(config, s),
        s.sampler,
        steps=s.steps,
        spacing=s.spacing,
        eta=s.eta,
        churn=Churn(*s.churn) if s.churn else None,
        prediction=d.prediction,
        sigma_data=d.sigma_data,
    )
