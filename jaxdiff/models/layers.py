"""The blocks that the UNet and the autoencoder share. Images are NHWC; parameters and norm statistics float32."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Dtype = Any
ZEROS = nn.initializers.zeros_init()
DEFAULT_KERNEL = nn.initializers.lecun_normal()


def timestep_embedding(
    t: Float[Array, " batch"], dim: int, max_period: float = 10_000.0, freq_shift: float = 0.0
) -> Float[Array, "batch {dim}"]:
    """Sinusoidal embedding [cos(t f_i), sin(t f_i)] with f_i = max_period^(-i / (dim/2 - freq_shift)) of timesteps t.

    Args: t in [0, T); dim, even; freq_shift, below dim/2: 1 in DDPM's own code, 0 in guided-diffusion.
    Source: Ho et al. 2020 (arXiv 2006.11239), in guided-diffusion's cos-first order.
    """
    half = dim // 2
    freqs = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * freqs[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def group_norm(channels: int, dtype: Dtype, eps: float, name: str | None = None, groups: int = 32) -> nn.GroupNorm:
    """GroupNorm with `groups` groups (the largest divisor of both where that does not divide the channels)."""
    return nn.GroupNorm(math.gcd(groups, channels), epsilon=eps, dtype=dtype, name=name)


def conv3x3(features: int, dtype: Dtype, *, zero: bool = False, name: str | None = None) -> nn.Conv:
    """3x3 convolution with padding 1, zero-initialised on demand."""
    init = ZEROS if zero else DEFAULT_KERNEL
    return nn.Conv(features, (3, 3), padding=1, dtype=dtype, kernel_init=init, name=name)


def upsample(x: Float[Array, "batch h w c"]) -> Float[Array, "batch 2*h 2*w c"]:
    """Nearest-neighbour upsampling by 2."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def average_pool(x: Float[Array, "batch h w c"]) -> Float[Array, "batch h//2 w//2 c"]:
    """2x2 mean pooling."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


class ResBlock(nn.Module):
    """Residual block: norm, SiLU, conv, norm (scaled and shifted by the embedding), SiLU, dropout, conv.

    `resample` is "", "up" or "down": both branches are resampled by 2 before the first convolution (BigGAN, ADM).
    Without `emb` the second norm is a plain one (the autoencoder's block).
    Source: Dhariwal & Nichol 2021 (arXiv 2105.05233), section 3; scale-shift norm: its section 3.1 (AdaGN).
    """

    features: int
    dtype: Dtype
    dropout: float = 0.0
    scale_shift_norm: bool = True
    resample: str = ""
    zero_init: bool = True
    eps: float = 1e-5
    norm_groups: int = 32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch h w c"],
        emb: Float[Array, "batch d"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch h2 w2 features"]:
        h = nn.silu(group_norm(x.shape[-1], self.dtype, self.eps, "norm_in", self.norm_groups)(x))
        if self.resample:
            resize = upsample if self.resample == "up" else average_pool
            h, x = resize(h), resize(x)
        h = conv3x3(self.features, self.dtype, name="conv_in")(h)

        norm = group_norm(self.features, self.dtype, self.eps, "norm_out", self.norm_groups)
        if emb is None:
            h = norm(h)
        else:
            width = self.features * (2 if self.scale_shift_norm else 1)
            e = nn.Dense(width, dtype=self.dtype, name="emb")(nn.silu(emb))[:, None, None, :]
            if self.scale_shift_norm:
                scale, shift = jnp.split(e, 2, axis=-1)
                h = norm(h) * (1 + scale) + shift
            else:
                h = norm(h + e)
        h = nn.Dropout(self.dropout, deterministic=deterministic)(nn.silu(h))
        h = conv3x3(self.features, self.dtype, zero=self.zero_init, name="conv_out")(h)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=self.dtype, name="skip")(x)
        return x + h


class Downsample(nn.Module):
    """Stride-2 3x3 convolution; `padding` tells torch's symmetric (1, 1) from the autoencoder's (0, 1)."""

    features: int
    dtype: Dtype
    padding: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h//2 w//2 features"]:
        pad = (self.padding, self.padding)
        return nn.Conv(self.features, (3, 3), strides=2, padding=pad, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch 2*h 2*w features"]:
        return conv3x3(self.features, self.dtype, name="conv")(upsample(x))


def count_params(params: Any) -> int:
    """Number of scalars in a parameter tree (arrays or ShapeDtypeStructs)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
