"""What diffusers computes with weights that need not be stored; `python -m tests.interop.golden` records it anew.

That takes torch and diffusers; `tests/golden/diffusers_vae.npz` says of which version.
"""

import json
import pathlib
import zlib

import numpy as np

PATH = pathlib.Path(__file__).parent.parent / "golden" / "diffusers_vae.npz"
CONFIGS = {
    "f4": {"block_out_channels": [16, 32, 64], "latent_channels": 3, "layers_per_block": 2, "norm_num_groups": 8},
    "f8": {"block_out_channels": [32, 32, 64, 64], "latent_channels": 4, "layers_per_block": 1},
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


def record():
    import diffusers
    import torch

    def to_torch(x):
        return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))

    def to_numpy(x):
        return x.detach().numpy().transpose(0, 2, 3, 1)

    out = {"version": np.array(diffusers.__version__)}
    image = np.random.default_rng(0).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    for name, fields in CONFIGS.items():
        levels = len(fields["block_out_channels"])
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        model = diffusers.AutoencoderKL(**fields, **blocks)
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict({key: torch.from_numpy(value) for key, value in weights(shapes).items()})
        posterior = model.encode(to_torch(image)).latent_dist
        out |= {
            f"{name}/config": np.array(json.dumps(dict(model.config))),
            f"{name}/shapes": np.array(json.dumps(shapes)),
            f"{name}/mean": to_numpy(posterior.mean),
            f"{name}/logvar": to_numpy(posterior.logvar),
            f"{name}/decoded": to_numpy(model.decode(posterior.mean).sample),
        }
    np.savez_compressed(PATH, image=image, **out)


if __name__ == "__main__":
    record()
