"""diffusers' side of the benchmarks: the same networks, trained and sampled as is usual in PyTorch on one GPU.

Channels last, bfloat16 by autocast (samples: by the weights), TF32, fused AdamW, clipping and moving average by
`foreach`, noise and timesteps drawn on the device, and nothing waited for within a round.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from ml_collections import ConfigDict

from benchmarks.harness import Side, Work
from benchmarks.ours import BATCHES, draw_batch
from jaxdiff.build import build_network, build_process
from jaxdiff.interop.unet2d import unet_config, unet_tensors
from jaxdiff.models import DiT, Network

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def set_up() -> None:
    """What is set once in a process."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def compute_dtype(config: ConfigDict) -> torch.dtype:
    """As jaxdiff.build.compute_dtype."""
    if config.dtype == "auto":
        return torch.bfloat16 if DEVICE == "cuda" else torch.float32
    return getattr(torch, config.dtype)


def build_unet(network: Any, work: Work, params: Any = None) -> torch.nn.Module:
    """diffusers' UNet2DModel of our UNet, with our parameters where they are given."""
    size, _, channels = work.shape
    # Twice the channels, and heads that are so many instead of so wide, can be computed there, but not exported.
    plain = network.clone(out_channels=channels, num_heads=0)
    config = unet_config(plain, channels, size) | {"out_channels": network.out_channels}
    model = diffusers.UNet2DModel.from_config(config)
    for module in model.modules():
        if network.num_heads and isinstance(module, Attention):
            module.heads = network.num_heads
    if params is not None:
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in unet_tensors(network, params).items()}
        model.load_state_dict(tensors)
    return model


def build_dit(network: DiT, work: Work) -> torch.nn.Module:
    """diffusers' DiTTransformer2DModel of our DiT, with one embedding of times and classes for all blocks."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=network.num_heads,
        attention_head_dim=network.width // network.num_heads,
        in_channels=work.shape[-1],
        out_channels=network.out_channels,
        num_layers=network.depth,
        sample_size=work.shape[0],
        patch_size=network.patch,
        num_embeds_ada_norm=network.num_classes,
    )
    first, *others = model.transformer_blocks
    first.norm1.emb.class_embedder.dropout_prob = 0.0  # labels are dropped with the other draws, once
    for block in others:
        block.norm1.emb = first.norm1.emb  # published as one; diffusers has a copy in each block
    return model


def build_model(work: Work, config: ConfigDict, params: Any = None) -> torch.nn.Module:
    """The network of `config` on the device; ValueError unless it has as many parameters as ours."""
    network: Network = build_network(config, work.shape[-1], work.classes)
    model = build_dit(network, work) if isinstance(network, DiT) else build_unet(network, work, params)
    count = sum(p.numel() for p in model.parameters())
    if work.count and count != work.count:
        raise ValueError(f"diffusers' network has {count:,} parameters, ours {work.count:,}")
    if config.model.remat == "blocks":
        model.enable_gradient_checkpointing()
    return model.to(DEVICE, memory_format=torch.channels_last)


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def release() -> None:
    """Give memory that is not in use back to the driver."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def compiled(function: Any, mode: str) -> Callable[..., Any]:
    """`function` by torch.compile, as one graph where that can be had."""
    torch._dynamo.reset()
    whole, parts = (torch.compile(function, fullgraph=full, mode=mode) for full in (True, False))
    chosen: list[Any] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not chosen:
            try:
                result = whole(*args, **kwargs)
                chosen.append(whole)
                return result
            except torch._dynamo.exc.Unsupported as error:
                print(f"torch.compile: not one graph: {str(error).splitlines()[0]}", flush=True)
                chosen.append(parts)
        return chosen[0](*args, **kwargs)

    return call


def training(work: Work, config: ConfigDict, params: Any = None, mode: str = "") -> Side:
    """The training step of `config`; with `mode` its network is compiled in that mode of torch.compile.

    `run` returns the last loss.
    """
    set_up()
    module, process = build_model(work, config, params), build_process(config)
    module.train()
    model = compiled(module, mode) if mode else module
    weights = list(module.parameters())
    average = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(
        weights, lr=config.lr, betas=tuple(config.adam_betas), weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    abar = torch.tensor(process.alphas_cumprod, dtype=torch.float32, device=DEVICE)
    signal, noise_level = abar.sqrt(), (1 - abar).sqrt()
    dtype, channels, done = compute_dtype(config), work.shape[-1], 0
    cast = torch.autocast(DEVICE, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    batches = [_on_device(draw_batch(work, config.batch_size, k)) for k in range(BATCHES)]

    def step() -> torch.Tensor:
        nonlocal done
        if DEVICE == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        batch = batches[done % BATCHES]
        if work.latents:
            x0 = batch["mean"] + torch.exp(0.5 * batch["logvar"]) * torch.randn_like(batch["mean"])
        else:
            x0 = batch["image"].float() / 127.5 - 1
        t = torch.randint(len(abar), (len(x0),), device=DEVICE)
        eps = torch.randn_like(x0)
        x = signal[t].view(-1, 1, 1, 1) * x0 + noise_level[t].view(-1, 1, 1, 1) * eps
        more = {}
        if work.classes:
            drop = torch.rand(len(x0), device=DEVICE) < config.diffusion.label_dropout
            more["class_labels"] = torch.where(drop, work.classes, batch["label"])
        with cast:
            output = model(x, t, return_dict=False, **more)[0]
        loss = torch.nn.functional.mse_loss(output[:, :channels].float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.clip_norm, foreach=True)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(config.ema_decay, (1 + done) / (10 + done))
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - decay)
        done += 1
        return loss.detach()

    def run(steps: int) -> float:
        for _ in range(steps):
            loss = step()
        synchronize()
        return float(loss)

    return Side(run, release)


def sampling(work: Work, config: ConfigDict, params: Any, mode: str = "") -> Side:
    """DDIM of `config.sample`, from noise of the device to uint8 images [N, H, W, 3] of the host; `mode` as above."""
    set_up()
    module, process, s = build_model(work, config, params), build_process(config), config.sample
    dtype = compute_dtype(config)
    module = module.to(dtype).eval()
    size, _, channels = work.shape
    every = config.diffusion.num_steps // s.steps
    times = range((s.steps - 1) * every, -1, -every)  # "leading"
    now = process.alphas_cumprod[list(times)]
    rows = np.stack([np.sqrt(now), np.sqrt(1 - now), *_next_levels(now)], axis=1)
    levels = torch.tensor(rows, dtype=torch.float32, device=DEVICE)
    steps = torch.tensor(list(times), device=DEVICE)
    labels = torch.arange(s.num, device=DEVICE) % max(work.classes, 1)
    more = {"class_labels": labels} if work.classes else {}

    def denoise(x: torch.Tensor, t: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        a, b, a_next, b_next = level.unbind()
        eps = module(x.to(dtype), t, return_dict=False, **more)[0][:, :channels].float()
        x0 = ((x - b * eps) / a).clamp(-1, 1)
        return a_next * x0 + b_next * (x - a * x0) / b

    update = compiled(denoise, mode) if mode else denoise
    graphs = mode in ("reduce-overhead", "max-autotune")  # whose results the next call overwrites

    @torch.inference_mode()
    def draw() -> np.ndarray:
        x = torch.randn(s.num, channels, size, size, device=DEVICE)
        x = x.contiguous(memory_format=torch.channels_last)
        for t, level in zip(steps, levels, strict=True):
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            x = update(x, t, level)
            x = x.clone() if graphs else x
        images = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return images.permute(0, 2, 3, 1).cpu().numpy()

    def run(batches: int) -> np.ndarray:
        for _ in range(batches):
            images = draw()
        return images

    return Side(run, release)


def _next_levels(now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sqrt(abar) and sqrt(1 - abar) after each step; at the end there is no noise."""
    after = np.append(now[1:], 1.0)
    return np.sqrt(after), np.sqrt(1 - after)


def _on_device(batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """A batch of ours, NCHW in channels-last memory."""
    tensors = {name: torch.from_numpy(value).to(DEVICE) for name, value in batch.items()}
    return {name: x.permute(0, 3, 1, 2) if x.ndim == 4 else x.long() for name, x in tensors.items()}
