"""UNets of other projects, whichever it is."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdiff.interop import adm, unet2d
from jaxdiff.interop.diffusers import read_config
from jaxdiff.interop.pipeline import schedule_fields
from jaxdiff.interop.tensors import import_params
from jaxdiff.interop.unet2d import Foreign
from jaxdiff.models import Network, forms


def read_unet(folder: pathlib.Path, shape: Sequence[int], num_classes: int) -> Foreign:
    """The UNet in a folder of ADM, a UNet2DModel of diffusers, or a pipeline, whose noise schedule is read as well.

    Args: shape [h, w, c], of what the network is to be used on; num_classes, of the data set.
    Raises: ConfigError naming what is wrong with the folder, or the option that we do not have.
    """
    if (folder / adm.WEIGHTS).is_file():
        return adm.read_unet(folder, shape, num_classes)
    if not (folder / "unet").is_dir():
        return unet2d.read_unet(folder, shape, num_classes)
    foreign = unet2d.read_unet(folder / "unet", shape, num_classes)
    fields = foreign.fields | schedule_fields(folder / "scheduler")
    if (folder / "vqvae").is_dir():
        scale = read_config(folder / "vqvae", "AutoencoderKL").get("scaling_factor", 0.18215)  # diffusers' default
        fields["diffusion.scaling_factor"] = scale
    return foreign._replace(fields=fields)


def import_unet(foreign: Foreign, model: Network, shape: Sequence[int], where: str) -> Any:
    """The parameters of `model`, built from the fields of `foreign` for images or latents [h, w, c].

    Raises: ConfigError as in `import_params`.
    """
    x, one = np.zeros((1, *shape), np.float32), np.zeros(1, np.int32)
    abstract = forms.abstract_init(model, x, one, one)
    return import_params(foreign.tensors, abstract, foreign.names, where)
