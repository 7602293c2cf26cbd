"""The blocks that the UNet and the autoencoder share. Images are NHWC; parameters and norm statistics float32."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxdiff.models import convolutions, forms
from jaxdiff.models.convolutions import LAYOUT, convolve_add
from jaxdiff.models.norm import BiasAdded, BiasPending, GroupNorm, Map, MapWithSums, Sums, add_bias, missing
from jaxdiff.models.products import HALF

Dtype = Any
ZEROS = nn.initializers.zeros_init()
DEFAULT_KERNEL = nn.initializers.lecun_normal()


def timestep_embedding(
    t: Float[Array, " batch"], dim: int, max_period: float = 10_000.0, freq_shift: float = 0.0
) -> Float[Array, "batch {dim}"]:
    """Sinusoidal embedding [cos(t f_i), sin(t f_i)] with f_i = max_period^(-i / (dim/2 - freq_shift)) of timesteps t.

    Args: t, in [0, T) where times are steps; dim, even; freq_shift, below dim/2: 1 in DDPM's own code, 0 in
      guided-diffusion.
    Source: Ho et al. 2020 (arXiv 2006.11239), in guided-diffusion's cos-first order.
    """
    half = dim // 2
    freqs = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * freqs[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def add_bias_deferred(x: BiasPending) -> BiasAdded:
    """Add the bias as a constant; its gradient comes later, from whatever uses the map (`settle`, or the next norm)."""
    return BiasAdded(add_bias(x.x, jax.lax.stop_gradient(x.bias)), x.bias)


def convolve(
    x: Float[Array, "batch h w c"],
    kernel: Float[Array, "k1 k2 c features"],
    padding: Sequence[tuple[int, int]] = ((1, 1), (1, 1)),
    stride: int = 1,
) -> Float[Array, "batch h2 w2 features"]:
    """Convolution, in the dtype of x."""
    kernel = kernel.astype(x.dtype)
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=LAYOUT)


def upsample_convolve(
    x: Float[Array, "batch h w c"], kernel: Float[Array, "3 3 c features"]
) -> tuple[Float[Array, "batch 2*h 2*w features"], Sums | None]:
    """3x3 convolution with padding 1 of the image upsampled by 2, from the image itself: 4/9 of the multiplications.

    And its sums for a norm, if they cost next to nothing.

    A pixel, which is two rows (and columns) of the upsampled image, reaches four rows of the result, the middle ones
    with two weights at once. That is the transpose of a convolution of stride 2, from the result to the image, which
    cuDNN computes without the zeros between.
    """

    def taps(k: Float[Array, "3 *rest"]) -> Float[Array, "4 *rest"]:
        return jnp.stack([k[2], k[1] + k[2], k[0] + k[1], k[0]])

    # With a barrier, for XLA would take the gradient apart again in the sum of its squares, slowly.
    kernel = jax.lax.optimization_barrier(kernel)
    composed = jax.vmap(taps)(taps(kernel)).swapaxes(2, 3)
    y, sums = _spread(x, composed.astype(x.dtype))
    return checkpoint_name(y, convolutions.NAME), sums


def _gather(
    y: Float[Array, "batch 2*h 2*w features"], kernel: Float[Array, "4 4 features c"]
) -> Float[Array, "batch h w c"]:
    return convolve(y, kernel, stride=2)


@jax.custom_vjp
def _spread(
    x: Float[Array, "batch h w c"], kernel: Float[Array, "4 4 features c"]
) -> tuple[Float[Array, "batch 2*h 2*w features"], Sums | None]:
    """The transpose of `_gather` for its first argument, and maybe its sums."""
    b, h, w, _ = x.shape
    if convolutions.has_kernel(x, kernel.shape[2], side=2):
        return convolutions.spread(x, kernel)
    y = jax.ShapeDtypeStruct((b, 2 * h, 2 * w, kernel.shape[2]), x.dtype)
    return jax.linear_transpose(lambda y: _gather(y, kernel), y)(x)[0], None


def _spread_backward(saved: tuple[Array, Array], gradients: tuple[Array, Any]) -> tuple[Array, Array]:
    (x, kernel), (dy, _) = saved, gradients
    # JAX's own gradient of the kernel is of an image with zeros between, which XLA would compute.
    dx, gather_backward = jax.vjp(lambda kernel: _gather(dy, kernel), kernel)
    return dx, gather_backward(x)[0]


_spread.defvjp(lambda x, kernel: (_spread(x, kernel), (x, kernel)), _spread_backward)


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


@jax.custom_jvp
def convolve_few(
    x: Float[Array, "batch h w c"], kernel: Float[Array, "3 3 c features"]
) -> Float[Array, "batch h w features"]:
    """3x3 convolution with padding 1 of few channels, in half precision on a GPU filled up to 16 with zeros: faster.

    Not so for the gradient of the kernel, which is that of the few.
    """
    few = x.shape[-1]
    if few < 16 and forms.for_gpu() and x.dtype in HALF:
        more = (0, 16 - few)
        x, kernel = jnp.pad(x, ((0, 0), (0, 0), (0, 0), more)), jnp.pad(kernel, ((0, 0), (0, 0), more, (0, 0)))
    return convolve(x, kernel)


convolve_few.defjvps(lambda dx, _, x, kernel: convolve(dx, kernel), lambda dkernel, _, x, kernel: convolve(x, dkernel))


def strided(padding: tuple[int, int]) -> Callable[[Array, Array], Array]:
    """Convolution of stride 2, with this padding before and after rows and columns."""
    return functools.partial(convolve, padding=[padding] * 2, stride=2)


Form = Literal["plain", "down", "down_after", "up", "first", "few"]
FORMS: dict[str, tuple[Callable[[Array, Array], Array], Callable[[Array, Array], Array]]] = {  # fast, plain
    "down": (strided((1, 1)), strided((1, 1))),
    "down_after": (strided((0, 1)), strided((0, 1))),
    "up": (lambda x, kernel: upsample_convolve(x, kernel)[0], lambda x, kernel: convolve(upsample(x), kernel)),
    "first": (convolve_few, convolve),
    "few": (project_convolve, lambda x, kernel: convolve(x.astype(jnp.float32), kernel)),
}


class Conv3x3(nn.Module):
    """3x3 convolution with padding 1, zero-initialised on demand, of parameters `kernel` and `bias`.

    Attributes:
      form: "plain"; "down" = with stride 2; "down_after" = so, and padded on the bottom and on the right alone; "up" =
        of the image upsampled by 2; "first" = of few channels; "few" = float32 of few features, see `project_convolve`.
      bias_apart: returns what lacks the bias, for a norm that adds it.
    """

    features: int
    dtype: Dtype
    zero: bool = False
    form: Form = "plain"
    bias_apart: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch h w c"],
        offset: Float[Array, " features"] | None = None,
        **added: Any,
    ) -> Any:
        """The result; in the plain form, with what `convolve_add` adds, owing the bias plus an offset."""
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", ZEROS if self.zero else DEFAULT_KERNEL, shape)
        bias = self.param("bias", ZEROS, shape[-1:])
        x, sums = x.astype(self.dtype), None
        if added:
            bias = bias if offset is None else bias + offset
            y, sums = convolve_add(x, kernel, jax.lax.stop_gradient(bias), **added)
            return BiasAdded(y, bias, sums)
        if self.form == "plain":
            y, sums = convolve_add(x, kernel)
        elif self.form == "up" and not forms.plain():
            y, sums = upsample_convolve(x, kernel)  # the only other one that may have sums
        else:
            y = FORMS[self.form][1 if forms.plain() else 0](x, kernel)
        return BiasPending(y, bias, sums) if self.bias_apart else add_bias(y, bias)


class Conv1x1(nn.Module):
    """What a 1x1 convolution of a concatenation, plus an offset, has for each part: (kernels, bias).

    Of parameters `kernel` and `bias`. The products are whoever's that adds them; the offset [c] is in the bias.
    """

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, widths: Sequence[int], offset: Float[Array, " c"] | None = None
    ) -> tuple[list[Float[Array, "_ features"]], Float[Array, " features"]]:
        kernel = self.param("kernel", DEFAULT_KERNEL, (1, 1, sum(widths), self.features))[0, 0]
        bias = self.param("bias", ZEROS, (self.features,))
        if offset is not None:
            bias = bias + offset @ kernel
        return jnp.split(kernel.astype(self.dtype), list(itertools.accumulate(widths))[:-1]), bias


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
    ) -> tuple[BiasAdded, list[MapWithSums]]:
        def norm(name: str) -> GroupNorm:
            return GroupNorm(self.norm_groups, self.eps, self.dtype, silu=True, name=name)

        h, parts, seen = norm("norm_in")(x)
        if self.resample == "down":
            h = average_pool(h)
        if self.resample:
            parts = [(upsample if self.resample == "up" else average_pool)(part) for part in parts]
        form: Form = "up" if self.resample == "up" else "plain"
        h = Conv3x3(self.features, self.dtype, form=form, bias_apart=True, name="conv_in")(h)

        offset, scale, shift = None, None, None
        if emb is not None:
            width = self.features * (2 if self.scale_shift_norm else 1)
            e = nn.Dense(width, dtype=self.dtype, name="emb")(nn.silu(emb))
            if self.scale_shift_norm:
                scale, shift = jnp.split(e, 2, axis=-1)
            else:
                offset = e
        h, *_ = norm("norm_out")((h,), offset, scale, shift)
        h = nn.Dropout(self.dropout, deterministic=deterministic)(h)
        parts, widths = [part.astype(self.dtype) for part in parts], [part.shape[-1] for part in parts]
        offset = missing(x)
        added: dict[str, Any] = {"residual": jnp.concatenate(parts, axis=-1)}
        if sum(widths) != self.features:
            kernels, offset = Conv1x1(self.features, self.dtype, name="skip")(widths, offset)
            added = {"parts": parts, "kernels": kernels}
        h = Conv3x3(self.features, self.dtype, zero=self.zero_init, name="conv_out")(h, offset, **added)
        return h, seen


class Downsample(nn.Module):
    """Stride-2 3x3 convolution; `padding` tells torch's symmetric (1, 1) from the autoencoder's (0, 1)."""

    features: int
    dtype: Dtype
    padding: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> BiasAdded:
        form: Form = "down" if self.padding == (1, 1) else "down_after"
        return add_bias_deferred(Conv3x3(self.features, self.dtype, form=form, bias_apart=True, name="conv")(x))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution, whose bias is left to the next block."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> BiasPending:
        return Conv3x3(self.features, self.dtype, form="up", bias_apart=True, name="conv")(x)


def count_params(params: Any) -> int:
    """Number of scalars in a parameter tree (arrays or ShapeDtypeStructs)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
