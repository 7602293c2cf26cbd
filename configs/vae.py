"""The KL autoencoder alone; its workdir can be given to configs/ldm_cfg.py as --config.autoencoder.path.

    python -m jaxdiff.main --config=configs/vae.py                # handwritten digits, on a CPU
    python -m jaxdiff.main --config=configs/vae.py:imagenet100    # ImageNet-100 at 128x128, on GPUs

Also `:cifar10`, `:folder` and `:npz` (with --config.data.path=...), `:tfds:NAME`.
Times and results: README.md, "Configs".
"""

from ml_collections import ConfigDict

from jaxdiff.config import fields


def get_config(dataset: str = "digits") -> ConfigDict:
    """The experiment on a data set in `jaxdiff.config.fields.DATASETS`: stage 1 of configs/ldm_cfg.py."""
    config = fields.base("vae", dataset)
    config.autoencoder = fields.autoencoder(dataset)
    config.update(fields.autoencoder_recipe(dataset))
    return config
