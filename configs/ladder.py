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

# Each is a latent diffusion of its own, with these fields changed. A new one is a line here, and its share below.
TECHNIQUES: dict[str, dict[str, Any]] = {
    "cosine": {"diffusion": {"schedule": "cosine"}},
}
SHARED = ("seed", "dtype", "eval")  # given once, for all trainings


def _experiment(name: str, dataset: str) -> ConfigDict:
    """The config of another file of this folder, from wherever the command is given."""
    config: ConfigDict = runpy.run_path(str(pathlib.Path(__file__).with_name(f"{name}.py")))["get_config"](dataset)
    return config


def get_config(dataset: str = "digits") -> ConfigDict:
    """The ladder of a data set in `jaxdiff.config.DATASETS`."""
    config = fields.base("ladder", dataset)
    config.minutes = 480.0  # for everything
    # Of the minutes; the rest is for sampling and scoring. 0 leaves a technique out.
    config.shares = ConfigDict(dict(autoencoder=0.15, ddpm=0.25, ldm=0.2, cosine=0.2))
    config.least_steps = 1000  # that a training gets, whatever its share
    config.ddpm = _experiment("ddpm", dataset)
    own_steps = config.ddpm.sample.steps
    config.ddpm.sample.update(sampler="ddpm", steps=config.ddpm.diffusion.num_steps)
    config.ldm = _experiment("ldm_cfg", dataset)
    config.ldm.sample.guidance = 0.0
    config.eval = fields.evaluation(dataset)
    config.eval.steps = (50, 100, 200)  # of DDIM on the pixels' checkpoint
    config.guidance = (1.5, 2.0, 3.0)  # on the latents' checkpoint
    config.techniques = ConfigDict(TECHNIQUES)

    if dataset == "digits":
        config.minutes, config.least_steps = 30.0, 100
        config.shares.update(autoencoder=0.05, ddpm=0.27, ldm=0.14, cosine=0.14)
        config.ddpm.sample.steps = own_steps  # 1000 cost a CPU too much
        config.eval.update(scores=("fd", "kid", "knn_accuracy"), num=300)

    # Pixels and latents may be of images of different sizes; all else of the data is the same.
    for recipe in (config.ddpm, config.ldm):
        recipe.data = ConfigDict({"image_size": recipe.data.image_size})
        for field in SHARED:
            del recipe[field]
    del config.data.image_size
    return config
