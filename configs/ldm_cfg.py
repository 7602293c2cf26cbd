"""Latent diffusion with classifier-free guidance: autoencoder -> latents -> UNet -> guided samples -> scores.

    python -m jaxdiff.main --config=configs/ldm_cfg.py                # handwritten digits, on a CPU
    python -m jaxdiff.main --config=configs/ldm_cfg.py:imagenet100    # ImageNet-100 at 128x128, on GPUs

Also `:cifar10`, `:folder` and `:npz` (with --config.data.path=...), `:tfds:NAME`.
Times and results: README.md, "Configs".
"""

from ml_collections import ConfigDict

from jaxdiff.config import fields


def get_config(dataset: str = "digits") -> ConfigDict:
    """The experiment on a data set in `jaxdiff.config.fields.DATASETS`."""
    config = fields.base("ldm", dataset)
    config.autoencoder = fields.autoencoder(dataset)
    # Workdir of a finished configs/vae.py run, in which {workdir} is that of this run; empty = train one first.
    config.autoencoder.path = ""
    config.autoencoder.latents = ""  # folder of the encoded data set; empty = in that workdir
    config.autoencoder.train = fields.autoencoder_recipe(dataset)
    config.update(fields.recipe())
    config.model = fields.unet()
    config.diffusion = fields.diffusion()
    config.sample = fields.sample()
    config.sample.update(guidance=2.0, clip=False)
    config.eval = fields.evaluation(dataset)

    if dataset == "digits":
        config.model.update(
            channels=64, channel_mult=(1, 1), num_res_blocks=1, attention_resolutions=(4, 2), head_dim=32
        )
        config.update(epochs=0.0, steps=1200, batch_size=64, lr=3e-3, warmup_steps=100, ema_decay=0.99)
        config.update(sample_every=400, checkpoint_every=400)
    elif dataset.endswith("cifar10"):  # latents of 8x8
        config.model.update(channels=192, channel_mult=(1, 2), attention_resolutions=(8, 4))
        config.update(epochs=200.0, lr=2e-4, batch_size=512)
    else:  # latents of 32x32 at 128x128 pixels
        config.model.update(channels=192, channel_mult=(1, 2, 4), attention_resolutions=(16, 8))
    return config
