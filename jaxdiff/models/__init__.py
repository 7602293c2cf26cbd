"""Networks in Flax linen: pure `apply(params, ...)` functions over NHWC arrays."""

from jaxdiff.models.autoencoder import AutoencoderKL, Posterior
from jaxdiff.models.dit import DiT
from jaxdiff.models.tiling import decode_in_parts, decode_tiled
from jaxdiff.models.unet import UNet

Network = UNet | DiT  # what denoises: `apply(params, x, t, y, deterministic)`

__all__ = ["AutoencoderKL", "DiT", "Network", "Posterior", "UNet", "decode_in_parts", "decode_tiled"]
