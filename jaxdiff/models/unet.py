"""The noise-prediction UNet of DDPM and ADM with cross-attention to condition tokens."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff.models import convolutions
from jaxdiff.models.attention import Attention
from jaxdiff.models.layers import (
    Conv3x3,
    Downsample,
    Dtype,
    ResBlock,
    Upsample,
    add_bias_deferred,
    average_pool,
    timestep_embedding,
)
from jaxdiff.models.norm import BiasAdded, GroupNorm, MapWithSums, Stream, keep, settle


def keep_products(primitive: Any, *args: Any, **params: Any) -> bool:
    """Whether the backward pass finds an operation's result in memory: convolutions and products with weights.

    Not attention's products, of which one is n x m.
    """
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    convolution = primitive.name == "conv_general_dilated" or params.get("name") == convolutions.NAME
    return convolution or dots(primitive, *args, **params)


# What is made of the class of a block, by the name of what the backward pass computes again. On a CPU nothing is saved:
# there XLA removes the barriers, and computes once what it then finds twice.
REMAT: dict[str, Callable[..., Any]] = {
    "none": lambda block, **_: block,
    "blocks": nn.remat,  # all inside of residual and attention blocks
    "dots": functools.partial(nn.remat, policy=keep_products),  # of these all but what `keep_products` keeps
}


class UNet(nn.Module):
    """UNet `apply(params, x, t, y) -> prediction` of the shape of x with `out_channels` channels, in float32.

    Source: ADM (arXiv 2105.05233); with `scale_shift_norm=False, resblock_updown=False` the UNet of DDPM.

    Attributes:
      channels: width of the first level; level i has channels * channel_mult[i] (rounded), and half its resolution.
      attention_resolutions: feature-map heights at which self-attention (and cross-attention) blocks stand.
      head_dim, num_heads: channels of one attention head, or where not 0 the number of heads.
      num_classes: labels are 0..num_classes-1, and num_classes is the null label; 0 = unconditional (y unused).
      null_class: whether the table of classes has a row for the null label.
      context_tokens: length of the token sequence that the class is embedded to for cross-attention; 0 = none.
      scale_shift_norm: the embedding scales and shifts the second norm of a block; else it is added before that norm.
      resblock_updown: residual blocks change the resolution; else a strided, or after upsampling a plain, convolution.
      downsample_padding: of the strided one: 1 = on all sides; 0 = 1 on the bottom and on the right (DDPM's own code).
      mid_attention: whether attention blocks stand in the middle too.
      norm_groups, norm_eps: of every GroupNorm, see `norm.GroupNorm`. freq_shift: of `timestep_embedding`.
      cross_resolution: heights at which the up path, at a level's end, attends to `level_tokens` of all levels.
      qk_norm, attention_chunk: of all attention, see `Attention` and `attend`. remat: a name in `REMAT`.
      dtype: of the computation. Parameters, norm statistics and the output are float32.
    """

    out_channels: int
    channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    head_dim: int = 64
    num_classes: int = 0
    context_tokens: int = 0
    dropout: float = 0.0
    scale_shift_norm: bool = True
    resblock_updown: bool = True
    num_heads: int = 0
    null_class: bool = True
    downsample_padding: int = 1
    mid_attention: bool = True
    norm_groups: int = 32
    norm_eps: float = 1e-5
    freq_shift: float = 0.0
    cross_resolution: tuple[int, ...] = ()
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
        emb, context = self.embed(t, y)
        norm: dict[str, Any] = {"eps": self.norm_eps, "norm_groups": self.norm_groups}
        res_block, attention_block = REMAT[self.remat](ResBlock, static_argnums=3), REMAT[self.remat](Attention)

        def res(features: int, name: str, resample: str = "") -> ResBlock:
            inner = (features, self.dtype, self.dropout, self.scale_shift_norm, resample)
            return res_block(*inner, **norm, name=name)

        def attention(name: str) -> Attention:
            heads = {"num_heads": self.num_heads, "qk_norm": self.qk_norm, "chunk": self.attention_chunk}
            return attention_block(self.head_dim, self.dtype, **heads, **norm, name=name)

        def attend(h: Stream, name: str) -> Stream:
            h = attention(f"{name}_attn")(h)
            return h if context is None else attention(f"{name}_cross")(h, context)

        widths = [round(self.channels * m) for m in self.channel_mult]
        last = len(widths) - 1
        h: Stream = add_bias_deferred(Conv3x3(widths[0], self.dtype, form="first", bias_apart=True, name="conv_in")(x))
        skips: list[MapWithSums] = []  # as the next block's norm returns them
        maps: list[Array] = []

        def down(features: int, name: str, resample: str = "") -> BiasAdded:
            out, (seen,) = res(features, name, resample)((h,), emb, deterministic)
            skips.append(seen)
            return out

        for i, width in enumerate(widths):
            for j in range(self.num_res_blocks):
                h = down(width, f"down{i}_res{j}")
                if h.x.shape[1] in self.attention_resolutions:
                    h = attend(h, f"down{i}_{j}")
            if i == last:
                h = down(widths[-1], "mid_res0")
            elif self.resblock_updown:
                h = down(width, f"down{i}_resample", "down")
            else:
                skips.append(keep(h))
                padding = (self.downsample_padding, 1)
                h = Downsample(width, self.dtype, padding, name=f"down{i}_resample")(skips[-1].x)
            maps.append(skips[-1].x)

        if self.mid_attention:
            h = attend(h, "mid")
        h, _ = res(widths[-1], "mid_res1")((h,), emb, deterministic)
        tokens = self.level_tokens(maps) if self.cross_resolution else None

        for i, width in reversed(list(enumerate(widths))):
            for j in range(self.num_res_blocks + 1):
                h, _ = res(width, f"up{i}_res{j}")((h, skips.pop()), emb, deterministic)
                if h.x.shape[1] in self.attention_resolutions:
                    h = attend(h, f"up{i}_{j}")
            if h.x.shape[1] in self.cross_resolution:
                h = attention(f"up{i}_levels")(h, tokens)
            if i > 0 and self.resblock_updown:
                h, _ = res(width, f"up{i}_resample", "up")((h,), emb, deterministic)
            elif i > 0:
                h = Upsample(width, self.dtype, name=f"up{i}_resample")(settle(h))

        # The last convolution's result is float32: the sampler would add up bfloat16's rounding of eps.
        y, *_ = GroupNorm(self.norm_groups, self.norm_eps, self.dtype, silu=True, name="norm_out")((h,))
        return Conv3x3(self.out_channels, self.dtype, zero=True, form="few", name="conv_out")(y)

    def level_tokens(self, maps: Sequence[Array]) -> Float[Array, "batch m c"]:
        """Each level's last map before the middle, pooled to the lowest's grid and projected to its width c: tokens.

        There are as many of every level, so that to attend to all levels costs in proportion to the positions that do.
        Source of the pooling: PVT v2 (Wang et al. 2021, arXiv 2106.13797), for attention within one map.
        """
        (_, height, _, width), tokens = maps[-1].shape, []
        for i, pooled in enumerate(maps):
            while pooled.shape[1] > height:
                pooled = average_pool(pooled)
            pooled = pooled.reshape(len(pooled), -1, pooled.shape[-1])
            tokens.append(nn.Dense(width, dtype=self.dtype, name=f"level{i}_tokens")(pooled))
        return jnp.concatenate(tokens, axis=1)

    def embed(self, t: Array, y: Array | None) -> tuple[Array, Array | None]:
        """Timestep (and class) embedding [B, 4 channels], and the condition tokens [B, L, 4 channels] or None."""
        dim = 4 * self.channels
        emb = nn.Dense(dim, name="time_0")(timestep_embedding(t, self.channels, freq_shift=self.freq_shift))
        emb = nn.Dense(dim, name="time_1")(nn.silu(emb))
        context = None
        if self.num_classes:
            rows = self.num_classes + self.null_class
            emb = emb + nn.Embed(rows, dim, name="class_emb")(y)
            if self.context_tokens:
                tokens = nn.Embed(rows, self.context_tokens * dim, name="class_tokens")(y)
                context = tokens.reshape(-1, self.context_tokens, dim).astype(self.dtype)
        return emb.astype(self.dtype), context
