"""The blocks that the UNet and the autoencoder share. Images are NHWC; parameters and norm statistics float32."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.models import forms
from jaxdiff.models.norm import GroupNorm, Map, Owing, add_bias
from jaxdiff.models.products import add_products

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


def owe(x: Float[Array, "*rest c"], bias: Float[Array, " c"]) -> Owing:
    """x + bias, whose gradient for the bias comes from whoever uses it."""
    return Owing(add_bias(x, jax.lax.stop_gradient(bias)), bias)


def convolve(
    x: Float[Array, "batch h w c"],
    kernel: Float[Array, "k1 k2 c features"],
    padding: Sequence[tuple[int, int]] = ((1, 1), (1, 1)),
    stride: int = 1,
) -> Float[Array, "batch h2 w2 features"]:
    """Convolution, in the dtype of x."""
    layout, strides = ("NHWC", "HWIO", "NHWC"), (stride, stride)
    return jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), strides, padding, dimension_numbers=layout)


def upsample_convolve(
    x: Float[Array, "batch h w c"], kernel: Float[Array, "3 3 c features"]
) -> Float[Array, "batch 2*h 2*w features"]:
    """3x3 convolution with padding 1 of the image upsampled by 2, from the image itself: 4/9 of the multiplications.

    Of a 3x3 window in the upsampled image two rows (and columns) are of the same pixels, so that their weights add up:
    a pixel's four successors are four 2x2 convolutions.
    """
    rows = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], kernel.dtype)  # [successor, tap, row]
    return _successors(x, jnp.einsum("aps,bqt,stcf->abpqcf", rows, rows, kernel))


@jax.custom_jvp
def _successors(
    x: Float[Array, "batch h w c"], kernels: Float[Array, "2 2 2 2 c features"]
) -> Float[Array, "batch 2*h 2*w features"]:
    """The four convolutions beside one another: each padded on all sides, which cuDNN does itself, and cut."""
    _, h, w, _ = x.shape
    return _interleave(lambda a, b: convolve(x, kernels[a, b])[:, a : a + h, b : b + w])


def _padded_as_needed(x: Array, kernels: Array) -> Array:
    """`_successors`, for gradients: of what is cut XLA would compute all."""
    return _interleave(lambda a, b: convolve(x, kernels[a, b], ((1 - a, a), (1 - b, b))))


_successors.defjvps(
    lambda dx, _, x, kernels: _padded_as_needed(dx, kernels),
    lambda dkernels, _, x, kernels: _padded_as_needed(x, dkernels),
)


def _interleave(successor: Callable[[int, int], Float[Array, "batch h w c"]]) -> Float[Array, "batch 2*h 2*w c"]:
    """The maps `successor(a, b)` in rows a, 2 + a, ..., and columns b, 2 + b, ..."""

    def spread(y: Array, a: int, b: int) -> Array:
        return jax.lax.pad(y, jnp.zeros((), y.dtype), ((0, 0, 0), (a, 1 - a, 1), (b, 1 - b, 1), (0, 0, 0)))

    return functools.reduce(jnp.add, [spread(successor(a, b), a, b) for a in (0, 1) for b in (0, 1)])


def project_convolve(
    x: Float[Array, "batch h w c"], kernel: Float[Array, "3 3 c features"]
) -> Float[Array, "batch h w features"]:
    """3x3 convolution with padding 1 to few features, in float32, as a product with all nine taps and nine shifts.

    Convolutions compute at least some 32 features, and take their time for each.
    """
    _, h, w, _ = x.shape
    taps = jnp.einsum("bhwc,stcf->bhwstf", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    taps = jnp.pad(taps, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0), (0, 0)))
    shifted = [taps[:, s : s + h, t : t + w, s, t] for s in range(3) for t in range(3)]
    # Else XLA sums the shifts again wherever the result is used.
    return jax.lax.optimization_barrier(functools.reduce(jnp.add, shifted))


def strided(padding: tuple[int, int]) -> Callable[[Array, Array], Array]:
    """Convolution of stride 2, with this padding before and after rows and columns."""
    return functools.partial(convolve, padding=[padding] * 2, stride=2)


Form = Literal["plain", "down", "down_after", "up", "few"]
FORMS: dict[str, tuple[Callable[[Array, Array], Array], Callable[[Array, Array], Array]]] = {  # fast, plain
    "plain": (convolve, convolve),
    "down": (strided((1, 1)), strided((1, 1))),
    "down_after": (strided((0, 1)), strided((0, 1))),
    "up": (upsample_convolve, lambda x, kernel: convolve(upsample(x), kernel)),
    "few": (project_convolve, lambda x, kernel: convolve(x.astype(jnp.float32), kernel)),
}


class Conv3x3(nn.Module):
    """3x3 convolution with padding 1, zero-initialised on demand, of parameters `kernel` and `bias`.

    Attributes:
      form: "plain"; "down" = with stride 2; "down_after" = so, and padded on the bottom and on the right alone; "up" =
        of the image upsampled by 2; "few" = float32 of few features, see `project_convolve`.
      bias_apart: returns (without bias, bias), for a norm that adds it.
    """

    features: int
    dtype: Dtype
    zero: bool = False
    form: Form = "plain"
    bias_apart: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Any:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", ZEROS if self.zero else DEFAULT_KERNEL, shape)
        bias = self.param("bias", ZEROS, shape[-1:])
        function = FORMS[self.form][1 if forms.plain() else 0]
        y = function(x.astype(self.dtype), kernel)
        return (y, bias) if self.bias_apart else add_bias(y, bias)


class Conv1x1(nn.Module):
    """1x1 convolution of a concatenation, of parameters `kernel` and `bias`: (without bias, bias).

    The concatenation is not made.
    """

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, parts: Sequence[Float[Array, "batch h w _"]]
    ) -> tuple[Float[Array, "batch h w features"], Float[Array, " features"]]:
        widths = [part.shape[-1] for part in parts]
        kernel = self.param("kernel", DEFAULT_KERNEL, (1, 1, sum(widths), self.features))[0, 0]
        bias = self.param("bias", ZEROS, (self.features,))
        kernels = jnp.split(kernel.astype(self.dtype), list(itertools.accumulate(widths))[:-1])
        return add_products([part.astype(self.dtype) for part in parts], kernels), bias


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

    Of one map, or of several as if they were concatenated. These are returned too, for whoever else uses them.
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
        x: Sequence[Map],
        emb: Float[Array, "batch d"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Owing, list[Float[Array, "batch h w _"]]]:
        def norm(name: str) -> GroupNorm:
            return GroupNorm(self.norm_groups, self.eps, self.dtype, silu=True, name=name)

        h, parts, seen = norm("norm_in")(x)
        if self.resample == "down":
            h = average_pool(h)
        if self.resample:
            parts = [(upsample if self.resample == "up" else average_pool)(part) for part in parts]
        form: Form = "up" if self.resample == "up" else "plain"
        h, bias = Conv3x3(self.features, self.dtype, form=form, bias_apart=True, name="conv_in")(h)

        offset, scale, shift = bias[None], None, None
        if emb is not None:
            width = self.features * (2 if self.scale_shift_norm else 1)
            e = nn.Dense(width, dtype=self.dtype, name="emb")(nn.silu(emb))
            if self.scale_shift_norm:
                scale, shift = jnp.split(e, 2, axis=-1)
            else:
                offset = offset + e
        h, *_ = norm("norm_out")((h,), offset, scale, shift)
        h = nn.Dropout(self.dropout, deterministic=deterministic)(h)
        h, bias = Conv3x3(self.features, self.dtype, zero=self.zero_init, bias_apart=True, name="conv_out")(h)
        if sum(part.shape[-1] for part in parts) == self.features:
            skip = jnp.concatenate(parts, axis=-1)
        else:
            skip, skip_bias = Conv1x1(self.features, self.dtype, name="skip")(parts)
            bias = bias + skip_bias
        # What cuDNN's convolutions add themselves: a vector, and a map.
        return Owing(skip + add_bias(h, jax.lax.stop_gradient(bias)), bias), seen


class Downsample(nn.Module):
    """Stride-2 3x3 convolution; `padding` tells torch's symmetric (1, 1) from the autoencoder's (0, 1)."""

    features: int
    dtype: Dtype
    padding: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Owing:
        form: Form = "down" if self.padding == (1, 1) else "down_after"
        return owe(*Conv3x3(self.features, self.dtype, form=form, bias_apart=True, name="conv")(x))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Owing:
        return owe(*Conv3x3(self.features, self.dtype, form="up", bias_apart=True, name="conv")(x))


def count_params(params: Any) -> int:
    """Number of scalars in a parameter tree (arrays or ShapeDtypeStructs)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
