"""Whether diffusers draws the same images as we do from the same noise: export a workdir, sample it both ways, compare.

    pip install -e ".[interop]"
    python -m benchmarks.diffusers_parity --workdir=runs/ldm-digits

Takes any workdir that --mode=export takes, with DDIM in place of its sampler. Class-conditional models are sampled with
diffusers' UNet2DModel and DDIMScheduler, as in docs/diffusers.md; unconditional ones with the pipeline that
`DiffusionPipeline.from_pretrained` makes of the folder. Everything runs in float32 on the CPU. Prints the largest
difference of the images, in [-1, 1], and exits with 1 where it is above --tolerance.
"""

import argparse
import os
import pathlib
import sys
import tempfile
from typing import Any
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"

import diffusers
import jax.numpy as jnp
import numpy as np
import torch
from absl import logging

from jaxdiff import diffusion, startup
from jaxdiff import mesh as meshes
from jaxdiff.keys import named_key
from jaxdiff.samples import label_names, sample_labels
from jaxdiff.sampling import load_generator


@torch.no_grad()
def draw_classes(
    folder: pathlib.Path, x: torch.Tensor, labels: torch.Tensor, w: float, steps: int, clip: bool
) -> torch.Tensor:
    """Images [N, 3, H, W] of the classes `labels` from noise x [N, c, h, w], with guidance by the null class."""
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    null = torch.full_like(labels, unet.config.num_class_embeds - 1)
    for t in scheduler.timesteps:
        eps = unet(x, t, labels).sample
        if w:
            eps = (1 + w) * eps - w * unet(x, t, null).sample
        x = scheduler.step(eps, t, x, use_clipped_model_output=clip).prev_sample
    if (folder / "vqvae").is_dir():
        x = diffusers.AutoencoderKL.from_pretrained(folder / "vqvae").decode(x).sample
    return x.clamp(-1, 1)


def draw_pipeline(folder: pathlib.Path, x: torch.Tensor, steps: int, clip: bool) -> torch.Tensor:
    """Images [N, 3, H, W] by diffusers' own pipeline, whose first noise is x [N, c, h, w]."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"use_clipped_model_output": clip} if isinstance(pipe, diffusers.DDIMPipeline) else {}
    with mock.patch.object(sys.modules[type(pipe).__module__], "randn_tensor", lambda *args, **kwargs: x):
        images = pipe(batch_size=len(x), num_inference_steps=steps, output_type="np", **options).images
    print(f"drawn by {type(pipe).__name__}")
    return torch.from_numpy(images.transpose(0, 3, 1, 2)) * 2 - 1


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--to", type=pathlib.Path, help="folder to write and keep; default one that is removed")
    parser.add_argument("--num", type=int, default=10, help="images")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)

    stored = startup.workdir_config(args.workdir, None, {})
    changes: dict[str, Any] = {"sampler": "ddim", "eta": 0.0, "guidance_interval": (), "guidance_rescale": 0.0}
    changes |= {"num": args.num, "batch_size": args.num, "steps": args.steps}
    changes |= {"spacing": "leading"} if stored.sample.spacing == "adm" else {}
    overrides = {f"sample.{name}": value for name, value in changes.items()}
    config = startup.workdir_config(args.workdir, None, overrides)
    generator, params, meta = load_generator(config, args.workdir, meshes.make_mesh(), None)
    labels = sample_labels(config.sample, label_names(config, meta["class_names"]))
    with mock.patch("jaxdiff.images.to_uint8", lambda x: x):  # the images before they are rounded
        ours = generator(params, config.sample, labels).clip(-1, 1)

    keys = diffusion.sample_keys(named_key(config.sample.seed, "sample"), jnp.arange(args.num))
    noise = np.asarray(diffusion.initial_noise(keys, generator.shape)).transpose(0, 3, 1, 2)
    x, s = torch.from_numpy(np.ascontiguousarray(noise)), config.sample
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.to or pathlib.Path(scratch) / "exported"
        startup.export_model(args.workdir, folder, None, overrides, None)
        if config.model.conditional:
            theirs = draw_classes(folder, x, torch.from_numpy(labels).long(), s.guidance, args.steps, s.clip)
        else:
            theirs = draw_pipeline(folder, x, args.steps, s.clip)
    difference = np.abs(ours - theirs.numpy().transpose(0, 2, 3, 1)).max()
    what = f"{args.num} images of {ours.shape[1]}x{ours.shape[2]}, {args.steps} steps, w = {s.guidance:g}"
    print(f"{what}: largest difference {difference:.2e} (of [-1, 1], standard deviation {ours.std():.2f})")
    if not difference <= args.tolerance:
        sys.exit(f"above the tolerance of {args.tolerance:g}")


if __name__ == "__main__":
    main()
