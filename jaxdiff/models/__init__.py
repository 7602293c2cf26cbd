"""Networks in Flax linen: pure `apply(params, ...)` functions over NHWC arrays."""

from jaxdiff.models.autoencoder import AutoencoderKL, Posterior
from jaxdiff.models.tiling import decode_in_parts, decode_tiled
from jaxdiff.models.unet import UNet

__all__ = ["AutoencoderKL", "Posterior", "UNet", "decode_in_parts", "decode_tiled"]
