"""The KL-regularised autoencoder of latent diffusion."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.models.attention import Attention
from jaxdiff.models.layers import Conv3x3, Downsample, Dtype, ResBlock, Upsample, add_bias_deferred
from jaxdiff.models.norm import GroupNorm, Stream, settle

NORM_EPS = 1e-6


class Posterior(NamedTuple):
    """Diagonal Gaussian q(z | image): mean and log variance [B, h, w, z], the latter clamped to [-30, 20]."""

    mean: Float[Array, "batch h w z"]
    logvar: Float[Array, "batch h w z"]

    def sample(self, noise: Float[Array, "batch h w z"]) -> Float[Array, "batch h w z"]:
        """The draw z = mean + exp(logvar / 2) noise that belongs to standard normal `noise`."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def kl(self) -> Float[Array, " batch"]:
        """KL(q || N(0, I)) in nats per image, summed over the latent's dimensions."""
        terms = self.mean**2 + jnp.exp(self.logvar) - 1 - self.logvar
        return 0.5 * terms.sum(axis=(1, 2, 3))


class Encoder(nn.Module):
    """Image -> 2 z channels at 1 / 2^(levels-1) of the resolution."""

    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    latent_channels: int
    norm_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w 3"]) -> Float[Array, "batch hf wf 2z"]:
        h: Stream = add_bias_deferred(
            Conv3x3(self.channels, self.dtype, form="first", bias_apart=True, name="conv_in")(x)
        )
        for i, mult in enumerate(self.channel_mult):
            width = self.channels * mult
            for j in range(self.num_res_blocks):
                h, _ = _res(width, self.norm_groups, self.dtype, f"down{i}_res{j}")((h,))
                if i in self.attention_levels:
                    h = _attention(self.norm_groups, self.dtype, f"down{i}_{j}_attn")(h)
            if i < len(self.channel_mult) - 1:
                h = Downsample(width, self.dtype, padding=(0, 1), name=f"down{i}_resample")(settle(h))
        h = _middle(h, self.norm_groups, self.dtype)
        y = _norm_act(h, self.norm_groups, self.dtype)
        return Conv3x3(2 * self.latent_channels, self.dtype, form="few", name="conv_out")(y)


class Decoder(nn.Module):
    """Latent -> image; one residual block more per level than the encoder."""

    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    out_channels: int
    norm_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, z: Float[Array, "batch hf wf z"]) -> Float[Array, "batch h w out"]:
        width = self.channels * self.channel_mult[-1]
        h: Stream = add_bias_deferred(Conv3x3(width, self.dtype, form="first", bias_apart=True, name="conv_in")(z))
        h = _middle(h, self.norm_groups, self.dtype)
        for i, mult in reversed(list(enumerate(self.channel_mult))):
            width = self.channels * mult
            for j in range(self.num_res_blocks + 1):
                h, _ = _res(width, self.norm_groups, self.dtype, f"up{i}_res{j}")((h,))
                if i in self.attention_levels:
                    h = _attention(self.norm_groups, self.dtype, f"up{i}_{j}_attn")(h)
            if i > 0:
                h = Upsample(width, self.dtype, name=f"up{i}_resample")(settle(h))
        y = _norm_act(h, self.norm_groups, self.dtype)
        return Conv3x3(self.out_channels, self.dtype, form="few", name="conv_out")(y)


class AutoencoderKL(nn.Module):
    """Autoencoder with a Gaussian latent; `encode(image) -> Posterior` and `decode(z) -> image`.

    Source: Rombach et al. 2022 (arXiv 2112.10752), the architecture of its f4, f8 and f16 models: channels 128,
    num_res_blocks 2; channel_mult (1, 2, 4) and 3 latent channels, (1, 2, 4, 4) and 4, or (1, 1, 2, 2, 4) and 16.

    Attributes:
      attention_levels: with attention after every residual block, 0 being the full resolution; the f16 has (4,).
      latent_channels: z; image_channels: of the image in [-1, 1].
      dtype: of the computation; the posterior and the decoded image are float32.
    """

    latent_channels: int = 3
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    image_channels: int = 3
    norm_groups: int = 32
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        shape = (self.channels, self.channel_mult, self.num_res_blocks, self.attention_levels)
        self.encoder = Encoder(*shape, self.latent_channels, self.norm_groups, self.dtype)
        self.decoder = Decoder(*shape, self.image_channels, self.norm_groups, self.dtype)
        self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1))
        self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    @property
    def downsampling(self) -> int:
        """The f of f4 or f8: image size / latent size."""
        return 2 ** (len(self.channel_mult) - 1)

    def encode(self, image: Float[Array, "batch h w 3"]) -> Posterior:
        """Posterior over latents [B, h/f, w/f, z] of images in [-1, 1]."""
        moments = self.quant_conv(self.encoder(image).astype(jnp.float32))
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, min=-30.0, max=20.0))

    def decode(self, z: Float[Array, "batch hf wf z"]) -> Float[Array, "batch h w 3"]:
        """Image in about [-1, 1] (not clipped) of a latent."""
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)

    def __call__(
        self, image: Float[Array, "batch h w 3"], noise: Float[Array, "batch hf wf z"]
    ) -> tuple[Float[Array, "batch h w 3"], Posterior]:
        """Reconstruction from the draw of the posterior that belongs to `noise`, and the posterior."""
        posterior = self.encode(image)
        return self.decode(posterior.sample(noise)), posterior


def _res(width: int, groups: int, dtype: Dtype, name: str) -> ResBlock:
    return ResBlock(width, dtype, zero_init=False, eps=NORM_EPS, norm_groups=groups, name=name)


def _attention(groups: int, dtype: Dtype, name: str) -> Attention:
    return Attention(0, dtype, zero_init=False, eps=NORM_EPS, norm_groups=groups, name=name)


def _middle(h: Stream, groups: int, dtype: Dtype) -> Stream:
    width = h.x.shape[-1]
    h, _ = _res(width, groups, dtype, "mid_res0")((h,))
    h = _attention(groups, dtype, "mid_attn")(h)
    return _res(width, groups, dtype, "mid_res1")((h,))[0]


def _norm_act(h: Stream, groups: int, dtype: Dtype) -> Array:
    return GroupNorm(groups, NORM_EPS, dtype, silu=True, name="norm_out")((h,))[0]
