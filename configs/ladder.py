"""The whole ladder of a data set within so many minutes: DDPM, DDIM, latent diffusion, guidance, techniques.

    python -m jaxdiff.main --mode=ladder --config=configs/ladder.py                # handwritten digits, on a CPU
    python -m jaxdiff.main --mode=ladder --config=configs/ladder.py:imagenet100    # ImageNet-100 at 128x128, on GPUs

Also `:cifar10`, `:folder` and `:npz` (with --config.data.path=...), `:tfds:NAME`.
The tables are written to WORKDIR/RESULTS.md, what was decided to WORKDIR/ladder.json.
"""

import pathlib
import runpy
from typing import Any

from ml_collections import ConfigDict

from jaxdiff.config import fields

# Names in configs/ablations.py: each is a latent diffusion of its own, with the fields there changed. A new one is a
# name here, and its share below.
TECHNIQUES = ("cosine", "learned_variance", "enhanced_attention", "combined")
SHARED = ("seed", "dtype", "eval")  # given once, for all trainings


def _beside(name: str) -> dict[str, Any]:
    """What another file of this folder defines, from wherever the command is given."""
    return runpy.run_path(str(pathlib.Path(__file__).with_name(f"{name}.py")))


def _experiment(name: str, dataset: str) -> ConfigDict:
    config: ConfigDict = _beside(name)["get_config"](dataset)
    return config


def _technique(name: str, config: ConfigDict) -> ConfigDict:
    """The fields that a technique changes, in their groups."""
    changed = _beside("ablations")["ABLATIONS"][name]
    groups: dict[str, dict[str, Any]] = {}
    for path, value in (changed(config) if callable(changed) else changed).items():
        group, field = path.split(".")
        groups.setdefault(group, {})[field] = value
    return ConfigDict(groups)


def get_config(dataset: str = "digits") -> ConfigDict:
    """The ladder of a data set in `jaxdiff.config.fields.DATASETS`."""
    config = fields.base("ladder", dataset)
    config.minutes = 480.0  # for everything
    # Of the minutes; the rest is for sampling and scoring. 0 leaves a technique out.
    config.shares = ConfigDict(dict(autoencoder=0.1, ddpm=0.18, ldm=0.1, **dict.fromkeys(TECHNIQUES, 0.1)))
    config.least_steps = 1000  # that a training gets, whatever its share
    config.ddpm = _experiment("ddpm", dataset)
    own_steps = config.ddpm.sample.steps
    config.ddpm.sample.update(sampler="ddpm", steps=config.ddpm.diffusion.num_steps)
    config.ldm = _experiment("ldm_cfg", dataset)
    config.ldm.sample.guidance = 0.0
    config.eval = fields.evaluation(dataset)
    config.eval.steps = (50, 100, 200)  # of DDIM on the pixels' checkpoint
    config.guidance = (1.5, 2.0, 3.0)  # on the latents' checkpoint
    config.techniques = ConfigDict({name: _technique(name, config.ldm) for name in TECHNIQUES})

    if dataset == "digits":
        config.minutes, config.least_steps = 30.0, 100
        config.shares.update(autoencoder=0.06, ddpm=0.2, ldm=0.15, cosine=0.15)
        config.shares.update(dict.fromkeys(TECHNIQUES[1:], 0.0))
        config.ddpm.data.image_size = 8  # as the digits were before they were enlarged
        config.ddpm.sample.steps = own_steps  # 1000 cost a CPU too much
        config.eval.update(scores=("fd", "kid", "knn_accuracy"), num=300)

    # Pixels and latents may be of images of different sizes; all else of the data is the same.
    for recipe in (config.ddpm, config.ldm):
        recipe.data = ConfigDict({"image_size": recipe.data.image_size})
        for field in SHARED:
            del recipe[field]
    del config.data.image_size
    return config
