"""What diffusers computes with weights that need not be stored; `python -m tests.interop.golden` records it anew.

That takes torch and diffusers; the files say of which version.
"""

import json
import pathlib
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent.parent / "golden"
PATH, UNET_PATH = FOLDER / "diffusers_vae.npz", FOLDER / "diffusers_unet.npz"
SCHEDULER_PATH, SCHEDULER_STEPS = FOLDER / "diffusers_schedulers.npz", 20
CONFIGS = {
    "f4": {"block_out_channels": [16, 32, 64], "latent_channels": 3, "layers_per_block": 2, "norm_num_groups": 8},
    "f8": {"block_out_channels": [32, 32, 64, 64], "latent_channels": 4, "layers_per_block": 1},
    "f2 with attention": {
        "block_out_channels": [16, 32],
        "latent_channels": 2,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    },
}
UNETS = {
    # DDPM's blocks, heads of several channels, 10 classes and the null class.
    "classes": {
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "num_class_embeds": 11,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    },
    # All that DDPM's own checkpoints have.
    "ddpm": {
        "block_out_channels": [16, 32, 32],
        "layers_per_block": 2,
        "attention_head_dim": None,
        "norm_num_groups": 8,
        "norm_eps": 1e-6,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    # All that ADM has.
    "adm": {
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "attn_norm_num_groups": 4,
        "norm_num_groups": 4,
        "num_class_embeds": 10,
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    },
    "without attention": {
        "block_out_channels": [16, 24],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "add_attention": False,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
    },
}


def weights(shapes):
    """A state dict of these shapes: values are a function of the tensor's name."""
    tensors = {}
    for name, shape in shapes.items():
        n = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        norm = "norm" in name and name.endswith("weight")
        value = 1 + 0.1 * n if norm else 0.1 * n if name.endswith("bias") else n / np.sqrt(np.prod(shape[1:]))
        tensors[name] = value.astype(np.float32)
    return tensors


def to_torch(x):
    import torch

    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def to_numpy(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def with_weights(model):
    """The model, and the shapes of its tensors."""
    import torch

    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict({key: torch.from_numpy(value) for key, value in weights(shapes).items()})
    return model, shapes


def record_autoencoders():
    import diffusers

    out = {"version": np.array(diffusers.__version__)}
    image = np.random.default_rng(0).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    for name, fields in CONFIGS.items():
        levels = len(fields["block_out_channels"])
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        model, shapes = with_weights(diffusers.AutoencoderKL(**blocks | fields))
        posterior = model.encode(to_torch(image)).latent_dist
        out |= {
            f"{name}/config": np.array(json.dumps(dict(model.config))),
            f"{name}/shapes": np.array(json.dumps(shapes)),
            f"{name}/mean": to_numpy(posterior.mean),
            f"{name}/logvar": to_numpy(posterior.logvar),
            f"{name}/decoded": to_numpy(model.decode(posterior.mean).sample),
        }
    np.savez_compressed(PATH, image=image, **out)


def record_unets():
    import diffusers
    import torch

    x = np.random.default_rng(1).standard_normal((3, 16, 16, 3)).astype(np.float32)
    t, y = np.array([0, 511, 999]), np.array([0, 4, 9])
    out = {"version": np.array(diffusers.__version__)}
    for name, fields in UNETS.items():
        model, shapes = with_weights(diffusers.UNet2DModel(sample_size=16, **fields))
        labels = torch.from_numpy(y) if "num_class_embeds" in fields else None
        out |= {
            f"{name}/config": np.array(json.dumps(dict(model.config))),
            f"{name}/shapes": np.array(json.dumps(shapes)),
            f"{name}/out": to_numpy(model.eval()(to_torch(x), torch.from_numpy(t), labels).sample),
        }
    np.savez_compressed(UNET_PATH, x=x, t=t, y=y, **out)


def exported_schedulers():
    """(sampler, spacing, scheduler_config.json) of all samplers and spacings that are exported."""
    from configs import ddpm
    from jaxdiff.interop.pipeline import SAMPLERS, scheduler_config

    for sampler, theirs in SAMPLERS.items():
        for spacing in theirs.spacings:
            config = ddpm.get_config("digits")
            config.sample.update(sampler=sampler, spacing=spacing)
            yield sampler, spacing, scheduler_config(config)


def record_schedulers():
    """Every step of every scheduler, from the same x with the same eps and noise z."""
    import diffusers
    import torch
    from diffusers.schedulers import scheduling_ddpm

    x, eps, z = np.random.default_rng(2).standard_normal((3, 2, 2, 2, 3)).astype(np.float32)
    scheduling_ddpm.randn_tensor = lambda *args, **kwargs: torch.from_numpy(z)
    out = {"version": np.array(diffusers.__version__)}
    for sampler, spacing, config in exported_schedulers():
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        scheduler.set_timesteps(SCHEDULER_STEPS)
        options = {"use_clipped_model_output": True} if sampler == "ddim" else {}
        steps = [
            scheduler.step(torch.from_numpy(eps), t, torch.from_numpy(x), **options).prev_sample.numpy()
            for t in scheduler.timesteps
        ]
        out |= {
            f"{sampler}/{spacing}/config": np.array(json.dumps(config)),
            f"{sampler}/{spacing}/timesteps": scheduler.timesteps.numpy(),
            f"{sampler}/{spacing}/steps": np.array(steps),
        }
    np.savez_compressed(SCHEDULER_PATH, x=x, eps=eps, z=z, **out)


if __name__ == "__main__":
    record_schedulers()
    record_autoencoders()
    record_unets()
