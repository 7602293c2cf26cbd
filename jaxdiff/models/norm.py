"""GroupNorm with what stands around it: a concatenation, an offset, a scale and shift per image, SiLU."""

import functools
import importlib.util
import itertools
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


# Of a map, over some of its positions each: each channel's sum, and that of its squares.
Sums = Float[Array, "batch some 2 c"]


class MapWithSums(NamedTuple):
    """A map, and its sums where whoever made it, or normed it, had them at hand."""

    x: Float[Array, "*rest c"]
    sums: Sums | None = None


class BiasAdded(NamedTuple):
    """A map, the bias [C] that has been added to it as a constant, and maybe its sums.

    The bias's gradient, a sum over all positions of the map's, is left to `settle`, or to a norm, which computes it
    beside its own. It is whole only if all who use the map take what that one returns.
    """

    x: Float[Array, "*rest c"]
    bias: Float[Array, " c"]
    sums: Sums | None = None


class BiasPending(NamedTuple):
    """A map, the bias [C] that is yet to be added to it, by whoever uses it, where something is added anyway, and maybe
    its sums."""

    x: Float[Array, "*rest c"]
    bias: Float[Array, " c"]
    sums: Sums | None = None


Stream = BiasAdded | BiasPending | MapWithSums  # what blocks hand on
Map = Float[Array, "*rest c"] | Stream


def bare(x: Map) -> Float[Array, "*rest c"]:
    """The map itself."""
    return x.x if isinstance(x, Stream) else x


def sums_of(x: Map) -> Sums | None:
    """The map's sums, where they are known."""
    return x.sums if isinstance(x, Stream) else None


def missing(parts: Sequence[Map]) -> Float[Array, " c"] | None:
    """What the parts' concatenation lacks; None where no part lacks anything."""
    biases = [x.bias if isinstance(x, BiasPending) else jnp.zeros(bare(x).shape[-1]) for x in parts]
    return jnp.concatenate(biases) if any(isinstance(x, BiasPending) for x in parts) else None


def add_bias(x: Float[Array, "*rest c"], bias: Float[Array, " c"]) -> Float[Array, "*rest c"]:
    """Their sum, of the dtype of x."""
    return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


@jax.custom_jvp
def _with_bias_gradient(x: Array, bias: Array) -> Array:
    return x


@_with_bias_gradient.defjvp
def _(primals: Any, tangents: Any) -> Any:
    dx, dbias = tangents
    # Rounded last, so that backward the sum over the positions is of float32.
    return primals[0], dx + jnp.broadcast_to(dbias, dx.shape).astype(dx.dtype)


def settle(x: Map) -> Float[Array, "*rest c"]:
    """The map, with its bias added, and that bias's gradient."""
    if isinstance(x, BiasPending):
        return add_bias(x.x, x.bias)
    return _with_bias_gradient(x.x, x.bias) if isinstance(x, BiasAdded) else bare(x)


def keep(x: Map) -> MapWithSums:
    """`settle(x)`, and its sums where they are known."""
    return MapWithSums(settle(x), None if isinstance(x, BiasPending) else sums_of(x))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def has_kernel() -> bool:
    """Whether norms run as kernels of our own: on NVIDIA GPUs since Ampere, if `forms.with_kernels`."""
    return forms.with_kernels() and forms.capability() >= 8 and _has_triton()


class GroupNorm(nn.Module):
    """act((1 + scale) GroupNorm(concatenated parts + offset) + shift), and the parts again.

    There are `groups` groups, or the largest divisor of both where that does not divide the channels. Who uses the
    parts besides takes the returned ones, of which there are two for two uses: their gradients are then added up where
    the norm's own are computed, and so are those of biases that were added as constants. Biases that are pending are
    still pending in the maps that are returned.
    Statistics are float32, and of the parts' sums where all of them have such; else the second of the returned ones
    have those that were computed. Source: Wu & He 2018 (arXiv 1803.08494).

    Attributes: silu: whether act is SiLU; else it is the identity. dtype: of the result.
    """

    groups: int
    eps: float
    dtype: Dtype
    silu: bool = False

    @nn.compact
    def __call__(
        self,
        parts: Sequence[Map],
        offset: Float[Array, "#batch c"] | None = None,
        scale: Float[Array, "batch c"] | None = None,
        shift: Float[Array, "batch c"] | None = None,
    ) -> tuple[Float[Array, "batch h w c"], list[Float[Array, "batch h w _"]], list[MapWithSums]]:
        biases = tuple(part.bias if isinstance(part, BiasAdded) else None for part in parts)
        maps = [bare(part) for part in parts]
        channels, (b, h, w, _) = sum(x.shape[-1] for x in maps), maps[0].shape
        gamma = self.param("scale", nn.initializers.ones_init(), (channels,))
        beta = self.param("bias", nn.initializers.zeros_init(), (channels,))
        p, q = gamma[None], beta[None]
        if scale is not None and shift is not None:
            factor = 1 + scale.astype(jnp.float32)
            p, q = p * factor, q * factor + shift.astype(jnp.float32)
        if offset is not None:
            offset = offset.astype(jnp.float32)
        if (lacked := missing(parts)) is not None:
            offset = lacked[None] if offset is None else offset + lacked[None]
        norm = Norm(math.gcd(self.groups, channels), self.eps, self.silu, jnp.dtype(self.dtype), INTERPRET)
        flat = tuple(x.reshape(b, h * w, -1) for x in maps)
        found = [sums_of(part) for part in parts]
        sums = tuple(s for s in found if s is not None)
        known = sums if len(sums) == len(parts) else ()
        y, *uses, computed = (normalise if has_kernel() else reference)(norm, flat, offset, p, q, biases, known)
        own, others = ([x.reshape(b, h, w, -1) for x in use] for use in uses)
        seen = [MapWithSums(x, s) for x, s in zip(others, computed or found, strict=True)]
        return y.reshape(b, h, w, channels), own, seen


def reference(
    norm: Norm,
    parts: tuple[Array, ...],
    offset: Array | None,
    p: Float[Array, "#b c"],
    q: Float[Array, "#b c"],
    biases: tuple[Array | None, ...] = (),
    sums: tuple[Sums, ...] = (),
) -> tuple[Float[Array, "b n c"], tuple[Array, ...], tuple[Array, ...], tuple[Sums, ...]]:
    """act(p x + q) of the normalised concatenation [B, N, C] plus offset, the parts twice, and no sums; left to XLA.

    Offset, p and q are [B, C], or [1, C] for all images; `biases` is (), or each part's
    bias that was added as a constant; `sums`, () or those of all parts, are constants, and not used here.
    """
    del sums
    if biases:
        pairs = zip(parts, biases, strict=True)
        parts = tuple(x if bias is None else _with_bias_gradient(x, bias) for x, bias in pairs)
    x = jnp.concatenate(parts, axis=-1).astype(jnp.float32)
    if offset is not None:
        x = x + offset[:, None]
    grouped = x.reshape(*x.shape[:2], norm.groups, -1)
    mean = grouped.mean(axis=(1, 3))
    variance = jnp.square(grouped).mean(axis=(1, 3)) - jnp.square(mean)
    inv = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + norm.eps)
    mean, inv = (jnp.repeat(a, grouped.shape[-1], axis=1) for a in (mean, inv))
    y = (x - mean[:, None]) * (inv * p)[:, None] + q[:, None]
    return (nn.silu(y) if norm.silu else y).astype(norm.dtype), parts, parts, ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalise(
    norm: Norm,
    parts: tuple[Array, ...],
    offset: Array | None,
    p: Float[Array, "#b c"],
    q: Float[Array, "#b c"],
    biases: tuple[Array | None, ...] = (),
    sums: tuple[Sums, ...] = (),
) -> tuple[Float[Array, "b n c"], tuple[Array, ...], tuple[Array, ...], tuple[Sums, ...]]:
    """`reference` by the kernels of `jaxdiff.models.norm_kernels`: forward's sums where the sums are not known.

    Those are returned then, as constants to whoever differentiates.
    """
    from jaxdiff.models import norm_kernels  # Pallas takes a second to import

    y, _, computed = norm_kernels.forward(norm, parts, offset, p, q, sums)
    return y, parts, parts, tuple(computed)


def _forward(norm: Norm, *primals: Any) -> Any:
    from jaxdiff.models import norm_kernels

    values = jax.tree.map(lambda a: a.value, primals, is_leaf=lambda a: isinstance(a, CustomVJPPrimal))
    parts, offset, p, q, biases, sums = values
    y, stats, computed = norm_kernels.forward(norm, parts, offset, p, q, sums)
    return (y, parts, parts, tuple(computed)), (parts, offset, p, q, stats, biases, (None,) * len(sums))


def _backward(norm: Norm, saved: Any, gradients: Any) -> Any:
    from jaxdiff.models import norm_kernels

    parts, offset, p, q, stats, biases, no_sums = saved
    dy, *uses, _ = jax.tree.map(lambda g: None if isinstance(g, SymbolicZero) else g, gradients)
    if dy is None:
        dy = jnp.zeros(gradients[0].shape, gradients[0].dtype)
    kept = [use for use in uses if any(g is not None for g in use)]
    total = any(bias is not None for bias in biases)
    dparts, rows = norm_kernels.backward(norm, dy, kept, parts, offset, p, q, stats, total)
    sums = rows.sum(axis=0)  # one kernel for all of them
    vectors = [a for a in (p, q, offset) if a is not None]
    dp, dq, *doffset = (sums[i, None] if v.shape[0] == 1 else rows[:, i] for i, v in enumerate(vectors))
    if total:
        dbiases = jnp.split(sums[-1], list(itertools.accumulate(part.shape[-1] for part in parts))[:-1])
        biases = tuple(None if b is None else g.astype(b.dtype) for b, g in zip(biases, dbiases, strict=True))
    return tuple(dparts), doffset[0] if doffset else None, dp, dq, biases, no_sums


normalise.defvjp(_forward, _backward, symbolic_zeros=True)
