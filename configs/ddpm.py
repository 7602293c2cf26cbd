"""DDPM in pixels: class-conditional noise prediction with self- and cross-attention, sampled with DDIM.

    python -m jaxdiff.main --config=configs/ddpm.py                # handwritten digits, on a CPU
    python -m jaxdiff.main --config=configs/ddpm.py:imagenet100    # ImageNet-100 at 128x128, on GPUs

Also `:cifar10`, `:folder` and `:npz` (with --config.data.path=...), `:tfds:NAME`.
Times and results: README.md, "Configs".
"""

from ml_collections import ConfigDict

from jaxdiff.config import fields


def get_config(dataset: str = "digits") -> ConfigDict:
    """The experiment on a data set in `jaxdiff.config.fields.DATASETS`."""
    config = fields.base("ddpm", dataset)
    config.update(fields.recipe())
    config.model = fields.unet()
    config.diffusion = fields.diffusion()
    config.sample = fields.sample()
    config.eval = fields.evaluation(dataset)

    if dataset == "digits":
        config.data.image_size = 16  # pixels cost a CPU dear: 1 s a step at 32x32
        config.model.update(
            channels=32, channel_mult=(1, 2, 2), num_res_blocks=1, attention_resolutions=(8,), head_dim=32
        )
        config.update(epochs=0.0, steps=1500, batch_size=32, lr=2e-3, warmup_steps=100, ema_decay=0.99)
        config.update(sample_every=500, checkpoint_every=500)
        config.sample.update(
            sampler="ddpm", steps=100, spacing="trailing"
        )  # its noise mends what little training leaves
    elif dataset.endswith("cifar10"):
        config.model.update(attention_resolutions=(16,))
        config.update(epochs=200.0, lr=2e-4)
    else:
        config.model.update(channel_mult=(1, 1, 2, 3, 4), attention_resolutions=(16, 8))
        config.update(batch_size=64)
    return config
