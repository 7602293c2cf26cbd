"""DiT: a transformer over the patches of an image or a latent, in place of the UNet."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdiff.models.attention import attend
from jaxdiff.models.layers import ZEROS, Dtype, timestep_embedding
from jaxdiff.models.unet import REMAT

WIDTHS = {"s": 384, "b": 768, "l": 1024, "xl": 1152}
DEPTHS = {"s": 12, "b": 12, "l": 24, "xl": 28}
HEADS = {"s": 6, "b": 12, "l": 16, "xl": 16}
# The published sizes by the name of the config, such as dit_b2: size b, patches of 2x2.
DITS: dict[str, dict[str, Any]] = {
    f"dit_{s}{patch}": dict(patch=patch, width=WIDTHS[s], depth=DEPTHS[s], num_heads=HEADS[s])
    for s in WIDTHS
    for patch in (2, 4, 8)
}
FREQUENCIES = 256  # numbers that a timestep is embedded to before its two layers
XAVIER = nn.initializers.xavier_uniform()
NORMAL = nn.initializers.normal(0.02)


def position_embedding(height: int, width: int, dim: int) -> Float[Array, "height width dim"]:
    """Fixed embedding of the places of a grid: half of it [sin, cos] of the column, half of the row.

    With frequencies 10000^(-i / (dim/4)); dim must be a multiple of 4. Source: DiT's code, after MAE's.
    """

    def along(length: int) -> Float[np.ndarray, "length half"]:
        angles = np.outer(np.arange(length), 10_000.0 ** (-np.arange(dim // 4) / (dim // 4)))
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)

    shape = (height, width, dim // 2)
    columns, rows = jnp.broadcast_to(along(width)[None], shape), jnp.broadcast_to(along(height)[:, None], shape)
    return jnp.concatenate([columns, rows], axis=-1)


def patch_kernel(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Float[Array, "p p c width"]:
    """Initial kernel of the convolution that embeds patches: as of a linear layer over all numbers of a patch."""
    return XAVIER(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


# Of these two the backward pass computes again what is cheap: a scan would keep every number in between of all blocks.
@functools.partial(jax.checkpoint, prevent_cse=False)
def modulated(
    h: Float[Array, "batch n c"], scale: Float[Array, "batch 1 c"], shift: Float[Array, "batch 1 c"]
) -> Float[Array, "batch n c"]:
    """Layer norm in float32, without parameters, scaled by 1 + `scale` and shifted."""
    h = jax.nn.standardize(h.astype(jnp.float32), epsilon=1e-6)
    return h * (1 + scale) + shift


@functools.partial(jax.checkpoint, prevent_cse=False)
def gelu(a: Float[Array, "batch n c"]) -> Float[Array, "batch n c"]:
    """The tanh approximation of GELU (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return nn.gelu(a, approximate=True)


class DiTBlock(nn.Module):
    """Attention and a perceptron of width 4 c, each scaled, shifted and gated by the embedding (adaLN-zero).

    The gates start at zero, so that a new block is the identity. Dropout is on the perceptron's inner layer. `qk_norm`
    and `chunk` are as of `Attention`.
    Called as `nn.scan` has it: (h, emb) -> (h, None).
    """

    num_heads: int
    dtype: Dtype
    dropout: float = 0.0
    qk_norm: bool = False
    chunk: int = 0
    deterministic: bool = True

    @nn.compact
    def __call__(
        self, h: Float[Array, "batch n c"], emb: Float[Array, "batch c"]
    ) -> tuple[Float[Array, "batch n c"], None]:
        b, n, c = h.shape

        def dense(features: int, name: str, init: Any = XAVIER) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)

        modulation = dense(6 * c, "modulation", ZEROS)(nn.silu(emb))[:, None]
        shift, scale, gate, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        qkv = dense(3 * c, "qkv")(modulated(h, scale, shift)).reshape(b, n, 3, self.num_heads, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))
        if self.qk_norm:
            q, k = (nn.RMSNorm(dtype=self.dtype, name=f"norm_{n}")(a) for n, a in (("q", q), ("k", k)))
        a = attend(q, k, v, self.chunk).reshape(b, n, c)
        h = h + gate * dense(c, "proj")(a)
        a = gelu(dense(4 * c, "mlp_in")(modulated(h, scale2, shift2)))
        a = nn.Dropout(self.dropout, deterministic=self.deterministic)(a)
        return h + gate2 * dense(c, "mlp_out")(a), None


def stacked(block: type[nn.Module], depth: int) -> Any:
    """So many blocks, one after the other on the same `emb`: parameters [depth, ...], each with draws of its own."""
    rngs: dict[Any, bool] = {"params": True, "dropout": True}
    return nn.scan(block, variable_axes={"params": 0}, split_rngs=rngs, in_axes=nn.broadcast, length=depth)


class DiT(nn.Module):
    """Transformer `apply(params, x, t, y) -> prediction` of the shape of x with `out_channels` channels, in float32.

    Height and width of x are multiples of `patch`. Source: Peebles & Xie 2023 (arXiv 2212.09748), with adaLN-zero
    blocks; its sizes are in `DITS`. The blocks' parameters are stacked, [depth, ...], and one compiled block is scanned
    over them: compiling takes as long for 28 as for one.

    Attributes:
      patch: side of a patch, which becomes one token. width: channels of a token, a multiple of 4 and of `num_heads`.
      num_classes, null_class, qk_norm, attention_chunk, remat: as of the UNet.
      dtype: of the computation. Parameters, norms and the output are float32.
    """

    out_channels: int
    patch: int
    width: int
    depth: int
    num_heads: int
    num_classes: int = 0
    null_class: bool = True
    dropout: float = 0.0
    qk_norm: bool = False
    attention_chunk: int = 0
    remat: str = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch h w c"],
        t: Float[Array, " batch"] | Int[Array, " batch"],
        y: Int[Array, " batch"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch h w out"]:
        p, c = self.patch, self.width
        emb = self.embed(t, y)
        embed_patches = nn.Conv(c, (p, p), p, padding="VALID", dtype=self.dtype, kernel_init=patch_kernel, name="patch")
        h = embed_patches(x.astype(self.dtype))
        b, rows, columns, _ = h.shape
        h = (h + position_embedding(rows, columns, c)[None].astype(self.dtype)).reshape(b, rows * columns, c)

        inner = (self.num_heads, self.dtype, self.dropout, self.qk_norm, self.attention_chunk, deterministic)
        block = REMAT[self.remat](DiTBlock, prevent_cse=False)
        h, _ = stacked(block, self.depth)(*inner, name="blocks")(h, emb.astype(self.dtype))

        # The last layer runs in float32: it is cheap, and the sampler would add up bfloat16's rounding of eps.
        modulation = nn.Dense(2 * c, kernel_init=ZEROS, name="modulation_out")(nn.silu(emb))[:, None]
        shift, scale = jnp.split(modulation, 2, axis=-1)
        h = nn.Dense(p * p * self.out_channels, kernel_init=ZEROS, name="out")(modulated(h, scale, shift))
        h = h.reshape(b, rows, columns, p, p, self.out_channels).swapaxes(2, 3)
        return h.reshape(b, rows * p, columns * p, self.out_channels)

    def embed(self, t: Array, y: Array | None) -> Float[Array, "batch c"]:
        """Embedding of timestep and class, in float32."""
        emb = nn.Dense(self.width, kernel_init=NORMAL, name="time_0")(timestep_embedding(t, FREQUENCIES))
        emb = nn.Dense(self.width, kernel_init=NORMAL, name="time_1")(nn.silu(emb))
        if self.num_classes:
            rows = self.num_classes + self.null_class
            emb = emb + nn.Embed(rows, self.width, embedding_init=NORMAL, name="class_emb")(y)
        return emb
