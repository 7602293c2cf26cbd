"""GroupNorm with what stands around it: a concatenation, an offset, a scale and shift per image, SiLU."""

import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float

from jaxdiff.models import forms

Dtype = Any
INTERPRET = False  # kernels run without a GPU, slowly: for tests


class Norm(NamedTuple):
    """What is known of a norm when it is compiled.

    eps: added to variances; silu: whether it follows; dtype: of y; interpret: whether kernels run without a GPU.
    """

    groups: int
    eps: float
    silu: bool
    dtype: Dtype
    interpret: bool = False


@functools.cache
def has_kernel() -> bool:
    """Whether norms run as kernels of our own: on NVIDIA GPUs since Ampere, unless `forms.plain`."""
    if forms.plain() or forms.capability() < 8:
        return False
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


class GroupNorm(nn.Module):
    """act((1 + scale) GroupNorm(concatenated parts + offset) + shift), and the parts again.

    There are `groups` groups, or the largest divisor of both where that does not divide the channels. Who uses the
    parts besides takes the returned ones: their gradients are then added up where the norm's own are computed.
    Statistics are float32. Source: Wu & He 2018 (arXiv 1803.08494).

    Attributes: silu: whether act is SiLU; else it is the identity. dtype: of the result.
    """

    groups: int
    eps: float
    dtype: Dtype
    silu: bool = False

    @nn.compact
    def __call__(
        self,
        parts: Sequence[Float[Array, "batch h w _"]],
        offset: Float[Array, "#batch c"] | None = None,
        scale: Float[Array, "batch c"] | None = None,
        shift: Float[Array, "batch c"] | None = None,
    ) -> tuple[Float[Array, "batch h w c"], list[Float[Array, "batch h w _"]]]:
        channels, (b, h, w, _) = sum(part.shape[-1] for part in parts), parts[0].shape
        gamma = self.param("scale", nn.initializers.ones_init(), (channels,))
        beta = self.param("bias", nn.initializers.zeros_init(), (channels,))
        p, q = gamma[None], beta[None]
        if scale is not None and shift is not None:
            factor = 1 + scale.astype(jnp.float32)
            p, q = p * factor, q * factor + shift.astype(jnp.float32)
        if offset is not None:
            offset = offset.astype(jnp.float32)
        norm = Norm(math.gcd(self.groups, channels), self.eps, self.silu, jnp.dtype(self.dtype), INTERPRET)
        flat = tuple(part.reshape(b, h * w, -1) for part in parts)
        y, flat = (normalise if has_kernel() else reference)(norm, flat, offset, p, q)
        return y.reshape(b, h, w, channels), [part.reshape(b, h, w, -1) for part in flat]


def reference(
    norm: Norm, parts: tuple[Array, ...], offset: Array | None, p: Float[Array, "#b c"], q: Float[Array, "#b c"]
) -> tuple[Float[Array, "b n c"], tuple[Array, ...]]:
    """act(p x + q) of the normalised concatenation [B, N, C] plus offset, and the parts; left to XLA.

    Offset, p and q are [B, C], or [1, C] for all images.
    """
    x = jnp.concatenate(parts, axis=-1).astype(jnp.float32)
    if offset is not None:
        x = x + offset[:, None]
    grouped = x.reshape(*x.shape[:2], norm.groups, -1)
    mean = grouped.mean(axis=(1, 3))
    variance = jnp.square(grouped).mean(axis=(1, 3)) - jnp.square(mean)
    inv = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + norm.eps)
    mean, inv = (jnp.repeat(a, grouped.shape[-1], axis=1) for a in (mean, inv))
    y = (x - mean[:, None]) * (inv * p)[:, None] + q[:, None]
    return (nn.silu(y) if norm.silu else y).astype(norm.dtype), parts


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalise(
    norm: Norm, parts: tuple[Array, ...], offset: Array | None, p: Float[Array, "#b c"], q: Float[Array, "#b c"]
) -> tuple[Float[Array, "b n c"], tuple[Array, ...]]:
    """`reference` by the kernels of `jaxdiff.models.norm_kernels`."""
    from jaxdiff.models import norm_kernels  # Pallas takes a second to import

    return norm_kernels.forward(norm, parts, offset, p, q)[0], parts


def _forward(norm: Norm, *primals: Any) -> Any:
    from jaxdiff.models import norm_kernels

    inputs = jax.tree.map(lambda a: a.value, primals, is_leaf=lambda a: isinstance(a, CustomVJPPrimal))
    y, mean, inv = norm_kernels.forward(norm, *inputs)
    return (y, inputs[0]), (*inputs, mean, inv)


def _backward(norm: Norm, saved: Any, gradients: Any) -> Any:
    from jaxdiff.models import norm_kernels

    parts, offset, *rest = saved
    dy, kept = gradients
    if all(isinstance(gradient, SymbolicZero) for gradient in kept):
        kept = ()  # nothing else uses the parts
    dy, *kept = (jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g for g in (dy, *kept))
    out = norm_kernels.backward(norm, dy, kept, parts, offset, *rest)
    n, vectors = len(parts), [a for a in (offset, *rest[:2]) if a is not None]
    sums = [g if v.shape == g.shape else g.sum(axis=0, keepdims=True) for g, v in zip(out[n:], vectors, strict=True)]
    return tuple(out[:n]), *([] if offset is not None else [None]), *sums


normalise.defvjp(_forward, _backward, symbolic_zeros=True)
