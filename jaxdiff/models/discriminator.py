"""The patch discriminator of the autoencoder's adversarial loss."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.models.layers import Dtype
from jaxdiff.models.norm import GroupNorm


class PatchDiscriminator(nn.Module):
    """Image -> one score for every patch, higher for real ones, in float32.

    `layers` 4x4 convolutions of stride 2, then two of stride 1, leaky ReLU of slope 0.2 between: with 3 of them a score
    sees 70 pixels. Source: Isola et al. 2017 (arXiv 1611.07004), section 3.2.2. What is batch normalisation there is
    GroupNorm here: an image's score depends neither on the others of the batch nor on how it is split over devices.
    """

    channels: int = 64
    layers: int = 3
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "batch h w 3"]) -> Float[Array, "batch h2 w2"]:
        init = nn.initializers.normal(0.02)
        h = image.astype(self.dtype)
        for i in range(self.layers + 1):
            stride, width = 2 if i < self.layers else 1, self.channels * min(2**i, 8)
            h = nn.Conv(width, (4, 4), stride, padding=1, dtype=self.dtype, kernel_init=init, name=f"conv{i}")(h)
            if i:
                h, *_ = GroupNorm(32, 1e-5, self.dtype, name=f"norm{i}")((h,))
            h = nn.leaky_relu(h, 0.2)
        h = nn.Conv(1, (4, 4), padding=1, kernel_init=init, name="conv_out")(h.astype(jnp.float32))
        return h[..., 0]


def patches(size: int, layers: int) -> int:
    """Height of the map of scores of images of height `size`; below 1 where they are too small."""
    for _ in range(layers):
        size = size // 2
    return size - 2
