"""The rungs of a ladder: which trainings they are, how each is scored, and what must hold of their config."""

import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxdiff.config import check, files
from jaxdiff.config.fields import number_or_several
from jaxdiff.config.require import require
from jaxdiff.errors import ConfigError
from jaxdiff.evaluation.evaluate import with_fields
from jaxdiff.training.stages import vae_config

FILE = "ladder.json"
SHARED = ("seed", "dtype")


def rung_names(config: ConfigDict) -> list[str]:
    """The trainings of a ladder, each after what it builds on."""
    return ["autoencoder", "ddpm", "ldm", *(name for name in config.techniques if config.shares[name])]


def rung_config(config: ConfigDict, name: str) -> ConfigDict:
    """The config of one training of a ladder, with the steps of its recipe; its workdir is one within the ladder's."""
    recipe = config.ddpm if name == "ddpm" else config.ldm
    own = ConfigDict(recipe.to_dict())
    own.data = ConfigDict({**config.data.to_dict(), **recipe.data.to_dict()})
    own.update({field: config[field] for field in SHARED})
    own.eval = ConfigDict({**config.eval.to_dict(), "steps": ()})
    own.sample.guidance = number_or_several(own.sample.guidance)
    if name == "autoencoder":
        return vae_config(own)
    if name != "ddpm":
        own.autoencoder.path = f"{files.WORKDIR}/../autoencoder"  # also when the ladder's folder is moved
    if name in config.techniques:
        own.name = f"{name}-{own.name.split('-', 1)[1]}"
        try:
            own.lock()  # so that an unknown field is an error
            own.update(config.techniques[name].to_dict())
            own.unlock()
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"config.techniques.{name}: {' '.join(str(error.args[0]).split())}") from None
    return own


def scorings(config: ConfigDict, name: str, own: ConfigDict) -> list[ConfigDict]:
    """The configs that a training's checkpoint is scored with, the first as its own."""

    def other(steps: Sequence[int] = (), **fields: Any) -> ConfigDict:
        scored = ConfigDict(own.to_dict())
        scored.sample = with_fields(own.sample, **fields)
        scored.eval.steps = tuple(steps)
        return scored

    if name == "autoencoder":
        return []
    further = {
        "ddpm": lambda: [other(config.eval.steps, sampler="ddim", eta=0.0)],
        "ldm": lambda: [other(guidance=number_or_several(tuple(config.guidance)))],
    }
    return [other(), *further.get(name, list)()]


def validate(config: ConfigDict, num_devices: int) -> None:
    """ConfigError with one line for what is wrong with a ladder, or with one of its trainings, which it then names."""
    require(config.minutes > 0, "minutes", config.minutes, "positive")
    require(config.least_steps >= 1, "least_steps", config.least_steps, "at least 1")
    names = ["autoencoder", "ddpm", "ldm"]
    for name in config.techniques:
        free = name not in names
        require(free, f"techniques.{name}", name, f"called other than {', '.join(names)}")
        require(name in config.shares, "shares", sorted(config.shares), f"with one for the technique {name}")
    for name, share in config.shares.items():
        known = name in names or name in config.techniques
        require(known, f"shares.{name}", share, f"of one of {', '.join([*names, *config.techniques])}")
        positive = share > 0 or (share == 0 and name in config.techniques)
        require(positive, f"shares.{name}", share, "positive; 0 leaves a technique out")
    total = sum(config.shares.values())
    require(total <= 1, "shares", dict(config.shares), f"at most 1 in all, and is {total:g}")
    require(len(config.eval.steps) > 0, "eval.steps", config.eval.steps, "the steps of DDIM, as in (50,100)")
    w = config.ldm.sample.guidance
    require(w == 0, "ldm.sample.guidance", w, "0: the weights are config.guidance")
    positive = all(type(w) in (int, float) and w > 0 for w in config.guidance) and len(config.guidance) > 0
    require(positive, "guidance", config.guidance, "positive weights, as in (1.5,2.)")
    path = config.ldm.autoencoder.path
    require(not path, "ldm.autoencoder.path", path, "empty: a ladder trains its own")
    for name in rung_names(config):
        own = rung_config(config, name)
        try:
            check.validate(own, num_devices)
            for scored in scorings(config, name, own):
                check.validate_sample(scored)
                check.validate_eval(scored)
        except ConfigError as error:
            raise ConfigError(f"of the ladder's training {name}: {error}") from None


def read_ladder(workdir: pathlib.Path) -> dict[str, Any]:
    """{"rungs": {name: decision and seconds}} of a workdir; empty where nothing was decided yet."""
    path = workdir / FILE
    return files.read_json(path) if path.exists() else {"rungs": {}}


def check_workdir(config: ConfigDict, workdir: pathlib.Path) -> None:
    """ConfigError as of `files.check_workdir`; minutes and shares may change until the first steps were decided."""
    decided = bool(read_ladder(workdir)["rungs"])

    def may_change(field: str) -> bool:
        budget = field.startswith("shares.") or field in ("minutes", "least_steps")
        return field in {f"data.{name}" for name in files.FREE_DATA_FIELDS} or (budget and not decided)

    files.check_workdir(config, workdir, may_change)
