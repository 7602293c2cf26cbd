"""Experiments that are run in seconds."""

from ml_collections import ConfigDict

from configs import ddpm, ldm_cfg, vae

UNET = dict(
    channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), head_dim=16, context_tokens=2
)
AUTOENCODER = dict(channels=8, channel_mult=(1, 2), num_res_blocks=1, latent_channels=2, scores=())
RECIPE = dict(epochs=0.0, steps=4, batch_size=16, warmup_steps=1, log_every=1, sample_every=0, checkpoint_every=100)


def tiny_config(experiment: str) -> ConfigDict:
    """A configs/*.py experiment on the digits at 16x16, with networks and a recipe that are run in seconds."""
    config = {"ddpm": ddpm, "ldm": ldm_cfg, "vae": vae}[experiment].get_config("digits")
    config.data.image_size = 8 if experiment == "ddpm" else 16
    config.update(RECIPE)
    if "eval" in config:
        config.eval.scores = ("knn_accuracy",)
    if "model" in config:
        config.model.update(UNET)
        config.sample.update(num=16, batch_size=16, sampler="ddim", steps=3, spacing="leading")
    if "autoencoder" in config:
        config.autoencoder.update(AUTOENCODER)
        if "train" in config.autoencoder:
            config.autoencoder.train.update(RECIPE)
    return config
