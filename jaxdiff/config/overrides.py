"""The check of what the command line gives: fields that nothing would look at."""

from collections.abc import Callable, Collection, Mapping

from ml_collections import ConfigDict

from jaxdiff.build import COMMON
from jaxdiff.config.check_diffusion import CONTINUOUS
from jaxdiff.config.require import get_field, require
from jaxdiff.models.dit import DITS

Used = tuple[str, Callable[[ConfigDict], bool]]
_betas: Used = ("diffusion.schedule", lambda c: c.diffusion.schedule not in ("cosine", *CONTINUOUS))
_adversary: Used = ("autoencoder.disc_weight", lambda c: c.autoencoder.disc_weight > 0)
# By field: the one that it hangs on, and whether that makes use of it.
USED: Mapping[str, Used] = {
    "data.path": ("data.source", lambda c: c.data.source != "digits"),
    "data.prepared": ("data.source", lambda c: c.data.source in ("folder", "tfds")),
    "diffusion.beta_start": _betas,
    "diffusion.beta_end": _betas,
    "diffusion.sigma_data": (
        "diffusion.prediction",
        lambda c: "edm" in (c.diffusion.prediction, c.diffusion.weighting),
    ),
    "sample.sigmas": ("diffusion.schedule", lambda c: c.diffusion.schedule == "edm"),
    "model.downsample_padding": ("model.resblock_updown", lambda c: not c.model.resblock_updown),
    "autoencoder.disc_start": _adversary,
    "autoencoder.disc_layers": _adversary,
    "eval.k": ("eval.scores", lambda c: "precision_recall" in c.eval.scores),
    "eval.splits": ("eval.scores", lambda c: "is" in c.eval.scores),
    "eval.nll_num": ("eval.nll", lambda c: c.eval.nll),
    "eval.every_num": ("eval.every", lambda c: c.eval.every > 0),
}


def check_overrides(config: ConfigDict, overrides: Collection[str]) -> None:
    """ConfigError when the command line gives, in `overrides`, a field that nothing looks at with this config."""
    for field in overrides:
        group, _, name = field.rpartition(".")
        if group.split(".")[-1] == "model" and name not in COMMON:
            network = get_field(config, group).get("name", "unet")
            allowed = f"left out with {group}.name = {network!r}, which has of {group} {', '.join(COMMON)} only"
            require(network not in DITS, field, get_field(config, field), allowed)
        first, _, rest = field.partition(".")
        of_rung = config.get("experiment") == "ladder" and first in ("ddpm", "ldm")
        part, prefix, inner = (config[first], f"{first}.", rest) if of_rung else (config, "", field)
        if inner in USED:
            other, used = USED[inner]
            allowed = f"left out with {prefix}{other} = {get_field(part, other)!r}, which does not use it"
            require(used(part), field, get_field(config, field), allowed)
