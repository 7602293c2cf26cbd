"""Attention over the positions of a feature map and over a sequence of condition tokens."""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff.models import forms, norm
from jaxdiff.models.convolutions import each_product, product_add
from jaxdiff.models.layers import DEFAULT_KERNEL, ZEROS, Dtype
from jaxdiff.models.norm import BiasAdded, BiasPending, GroupNorm, Map, settle
from jaxdiff.models.products import HALF

TILE = 64  # positions that flash kernels take at a time
LONGEST = 512  # positions, for kernels of our own


def attention_kernel(dtype: Dtype, head_dim: int, q_len: int, kv_len: int) -> Literal["ours", "cudnn", "xla"]:
    """Which kernels attend: "ours", or those of `jax.nn.dot_product_attention`, "cudnn" where they apply, else "xla".

    cuDNN's take half precision and head sizes that are multiples of 8 up to 128. They tile the sequence by `TILE`, so
    that shorter ones are left to XLA, which fuses them into two small matrix products. Ours are faster, by their
    backward pass, on Hopper GPUs for sequences of whole tiles that are not long.
    """
    half = jnp.dtype(dtype) in HALF
    if not (forms.for_gpu() and half and min(q_len, kv_len) >= TILE):
        return "xla"
    whole = q_len % TILE == 0 and kv_len % TILE == 0 and max(q_len, kv_len) <= LONGEST
    if norm.has_kernel() and forms.capability() == 9.0 and head_dim == 64 and whole:
        return "ours"
    return "cudnn" if head_dim % 8 == 0 and head_dim <= 128 else "xla"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_by_tiles(
    interpret: bool,
    q: Float[Array, "batch n heads d"],
    k: Float[Array, "batch m heads d"],
    v: Float[Array, "batch m heads d"],
) -> Float[Array, "batch n heads d"]:
    """`attend` by the kernels of `jaxdiff.models.attention_kernels`; `interpret`: without a GPU."""
    return _forward(interpret, q, k, v)[0]


def _forward(interpret: bool, q: Array, k: Array, v: Array) -> Any:
    from jaxdiff.models import attention_kernels  # Pallas takes a second to import

    y, log = attention_kernels.forward(q, k, v, interpret=interpret)
    return y, (q, k, v, y, log)


def _backward(interpret: bool, saved: Any, dy: Array) -> Any:
    from jaxdiff.models import attention_kernels

    return attention_kernels.backward(*saved, dy, interpret=interpret)


attend_by_tiles.defvjp(_forward, _backward)


def attend(
    q: Float[Array, "batch n heads d"],
    k: Float[Array, "batch m heads d"],
    v: Float[Array, "batch m heads d"],
    chunk: int = 0,
) -> Float[Array, "batch n heads d"]:
    """Softmax(q k^T / sqrt(d)) v per head, softmax in float32 (Vaswani et al. 2017, eq. 1).

    Where no flash kernel applies, `chunk` queries (0 = all) attend at a time, and the backward pass computes
    their weights again, so that chunk x m of the n x m are in memory (Rabe & Staats 2021, arXiv 2112.05682). Over
    m <= d keys all attend at once: the weights are no larger than q is.
    """
    (n, d), m = q.shape[1::2], k.shape[1]
    kernel = attention_kernel(q.dtype, d, n, m)
    if kernel == "ours":
        return attend_by_tiles(norm.INTERPRET, q, k, v)
    if kernel == "cudnn" or not 0 < chunk < n or m <= d:
        return jax.nn.dot_product_attention(q, k, v, implementation=kernel)

    def one(query: Float[Array, "batch heads d"]) -> Float[Array, "batch heads d"]:
        return jax.nn.dot_product_attention(query[:, None], k, v, implementation="xla")[:, 0]

    return jax.lax.map(jax.checkpoint(one), q.swapaxes(0, 1), batch_size=chunk).swapaxes(0, 1)


class Projections(nn.Module):
    """Linear maps whose parameters lie side by side in one `kernel` and `bias`: pairs (result, bias).

    To split those is cheaper than to split the result, and to put together the gradients of its pieces.

    Attributes: added: of each map, whether its result has the bias in it.
    """

    features: int
    added: tuple[bool, ...]
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch n c"]
    ) -> list[tuple[Float[Array, "batch n features"], Float[Array, " features"]]]:
        width = len(self.added) * self.features
        kernel = self.param("kernel", DEFAULT_KERNEL, (x.shape[-1], width)).astype(self.dtype)
        bias = self.param("bias", ZEROS, (width,))
        kernels, biases = (jnp.split(a, len(self.added), axis=-1) for a in (kernel, bias))
        added = [b if add else None for b, add in zip(biases, self.added, strict=True)]
        return list(zip(each_product(x.astype(self.dtype), kernels, added), biases, strict=True))


class Output(nn.Module):
    """Linear map of x + offset, and a residual, of parameters `kernel` and `bias`; the offset [c] is added to the bias
    instead."""

    features: int
    dtype: Dtype
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w c"], offset: Float[Array, " c"], residual: Float[Array, "batch h w features"]
    ) -> BiasAdded:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", ZEROS, (self.features,)) + offset @ kernel
        y, sums = product_add(x, kernel.astype(self.dtype), jax.lax.stop_gradient(bias), residual)
        return BiasAdded(y, bias, sums)


class Attention(nn.Module):
    """Residual multi-head attention of a feature map to itself, or to `context` tokens when they are given.

    The output projection starts at zero, so that a new block is the identity. There are `num_heads` heads, or where
    that is 0 as many as have `head_dim` channels each (0 = one); they must divide the channels. With `qk_norm` the
    queries and keys of each head have a root mean square of 1, times a learnt scale, so that the logits stay bounded
    (Dehghani et al. 2023, arXiv 2302.05442; in this form Esser et al. 2024, arXiv 2403.03206). `chunk`: see `attend`.
    """

    head_dim: int
    dtype: Dtype
    zero_init: bool = True
    eps: float = 1e-5
    norm_groups: int = 32
    num_heads: int = 0
    qk_norm: bool = False
    chunk: int = 0

    @nn.compact
    def __call__(self, x: Map, context: Float[Array, "batch m e"] | None = None) -> BiasAdded:
        x = settle(x) if isinstance(x, BiasPending) else x
        h, (x,), _ = GroupNorm(self.norm_groups, self.eps, self.dtype, name="norm")((x,))
        b, height, width, c = h.shape
        heads = self.num_heads or (c // self.head_dim if self.head_dim else 1)
        h = h.reshape(b, height * width, c)
        # Of the keys' bias, where they are not normed, all logits of a query shift by as much, of which the softmax
        # knows nothing; the weights of a query sum to 1, so that the values' may as well come after them.
        of_q, of_kv = (True,), (self.qk_norm, False)
        if context is None:
            (q, _), (k, _), (v, v_bias) = Projections(c, of_q + of_kv, self.dtype, name="qkv")(h)
        else:
            ((q, _),) = Projections(c, of_q, self.dtype, name="q")(h)
            context = nn.LayerNorm(dtype=self.dtype, name="norm_context")(context)
            (k, _), (v, v_bias) = Projections(c, of_kv, self.dtype, name="kv")(context)
        q, k, v = (a.reshape(b, -1, heads, c // heads) for a in (q, k, v))
        if self.qk_norm:
            q, k = (nn.RMSNorm(dtype=self.dtype, name=f"norm_{n}")(a) for n, a in (("q", q), ("k", k)))
        h = attend(q, k, v, self.chunk).reshape(x.shape)
        return Output(c, self.dtype, ZEROS if self.zero_init else DEFAULT_KERNEL, name="proj")(h, v_bias, x)
