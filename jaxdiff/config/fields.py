"""The fields of a config with their defaults and meaning, and the data sets by name."""

from typing import Any

from ml_collections import ConfigDict, FieldReference

from jaxdiff.errors import ConfigError

DATASETS: dict[str, dict[str, Any]] = {
    "digits": dict(source="digits", image_size=32, flip=False),
    "cifar10": dict(source="folder", path="data/cifar10", image_size=32, flip=True),
    "imagenet100": dict(source="folder", path="data/imagenet100", image_size=128, flip=True),
    "folder": dict(source="folder", image_size=128, flip=True),
    "npz": dict(source="npz", image_size=128, flip=True),
    "tfds:cifar10": dict(image_size=32),
    "tfds:NAME": dict(source="tfds", image_size=128, flip=True),
}


def dataset_fields(dataset: str) -> dict[str, Any]:
    """The fields `data` of a name in `DATASETS`, or of tfds:NAME for any NAME; ConfigError for another."""
    if dataset.startswith("tfds:"):
        return {**DATASETS["tfds:NAME"], **DATASETS.get(dataset, {}), "name": dataset.removeprefix("tfds:")}
    if dataset not in DATASETS:
        raise ConfigError(f"--config=...:{dataset}: the data set must be one of {', '.join(DATASETS)}")
    return DATASETS[dataset]


def base(experiment: str, dataset: str) -> ConfigDict:
    """Fields that every experiment has. `dataset`, and errors, as in `dataset_fields`."""
    config = ConfigDict()
    config.name = f"{experiment}-{dataset.replace(':', '-').replace('/', '-')}"  # the default workdir is runs/<name>
    config.experiment = experiment
    config.seed = 0  # of initialisation, data order and training noise
    config.dtype = "auto"  # of the computation: float32, bfloat16, or auto (bfloat16 on GPU)

    config.data = data = ConfigDict()
    data.source = ""  # digits, folder, npz or tfds
    data.path = (
        ""  # folder: where {train,val}/<class>/*.jpg are; npz: the file; tfds: its data folder, if not the usual one
    )
    data.name = ""  # tfds: the data set, as in tfds.builder
    data.classes = ""  # tfds: file with a class name to a line, if not all classes are wanted
    data.prepared = ""  # folder, tfds: where --mode=prepare stores; empty: PATH-SIZEpx, or data/NAME-SIZEpx
    data.max_rejected = 0.001  # share of unusable images above which --mode=prepare fails
    data.image_size = 0  # pixels; images are cropped to a square
    data.flip = True  # random horizontal mirroring
    data.threads = 8  # that read and decode
    data.workers = 0  # processes that read, with the threads each; 0 = the threads of this one, best up to some 8 cores
    data.cache_gb = 8.0  # images, or latents, that take less (and less than a quarter of the memory) are kept in memory
    data.update(dataset_fields(dataset))
    return config


def recipe() -> ConfigDict:
    """Fields of one training stage: AdamW with cosine annealing and clipping, and its averages."""
    return ConfigDict(
        dict(
            batch_size=128,  # global, over all devices and accumulated parts
            accumulate=1,  # parts that a batch is computed in, one after the other
            epochs=50.0,  # over the training images; 0 = as many as `steps` says
            steps=0,  # optimiser steps; 0 = as many as `epochs` says
            lr=1e-4,  # peak; cosine annealing to 0 at the last step
            warmup_steps=0,  # of linear increase from 0
            weight_decay=1e-4,
            adam_betas=(0.9, 0.999),  # decay of the averages of the gradient and of its square
            clip_norm=1.0,  # global gradient norm above which gradients are scaled down
            ema_decay=0.9999,  # warmed up as min(ema_decay, (1 + n) / (10 + n))
            ema_decays=(),  # of further averages, tracked beside; each costs a copy of the parameters on every device
            ema_sigma_rel=(),  # widths, relative to the steps, of power-function averages, as (0.05,0.1): docs/ema.md
            ema_snapshot_every=0,  # steps between copies of the latter in WORKDIR/snapshots, kept for good; 0 = none
            log_every=100,  # steps between lines of metrics.jsonl
            sample_every=5000,  # steps between sample (or reconstruction) grids; 0 = at the end only
            checkpoint_every=5000,  # steps between validation losses and checkpoints
            keep=2,  # checkpoints: the last so many, and the best by validation loss
        )
    )


def autoencoder(dataset: str) -> ConfigDict:
    """Architecture and loss of the KL autoencoder: f4 of latent diffusion, a small one for the digits."""
    config = ConfigDict(
        dict(
            channels=128,  # width of the first level
            channel_mult=(1, 2, 4),  # one entry a level; f = 2^(levels - 1)
            num_res_blocks=2,
            attention_levels=(),  # with attention, 0 = full resolution; (4,) in the f16 of latent diffusion
            latent_channels=3,
            norm_groups=32,  # of GroupNorm; fewer where they do not divide the channels
            kl_weight=1e-6,  # of the KL (nats an image) beside the summed absolute error
            perceptual_weight=0.2,  # of the distance in features beside the mean absolute error; 0 = none
            lpips="",  # file with the weights of LPIPS-VGG; empty = the distance in features of EfficientNet-Lite0
            disc_weight=0.5,  # of the discriminator's loss, relative to the reconstruction's gradient; 0 = none
            disc_start=0.25,  # share of the steps after which the discriminator plays
            disc_layers=3,  # of stride 2 of the discriminator, which judges patches of 16, 34, 70, ... pixels
            # At the end of training: names in jaxdiff.evaluation.reconstruction.SCORES.
            scores=("rfd_effnet_lite0", "effnet_lite0_distance"),
        )
    )
    if dataset == "digits":
        # f8: 4x4x4 numbers, as many as the 8x8 pixels that were enlarged. Smoother latents matter more than sharpness.
        config.update(channels=8, channel_mult=(1, 2, 4, 4), num_res_blocks=1, latent_channels=4, norm_groups=8)
        config.update(kl_weight=0.02, perceptual_weight=0.0, disc_weight=0.0)
    return config


def autoencoder_recipe(dataset: str) -> ConfigDict:
    """The training of that autoencoder, alone or as the first stage of latent diffusion."""
    config = recipe()
    if dataset != "digits":
        config.adam_betas = (0.5, 0.9)  # as is customary against a discriminator
    if dataset == "digits":
        config.update(
            epochs=0.0,
            steps=600,
            batch_size=16,
            lr=3e-3,
            warmup_steps=50,
            ema_decay=0.99,
            checkpoint_every=600,
        )
    elif dataset.endswith("cifar10"):
        config.update(epochs=50.0, batch_size=256)
    else:
        config.update(epochs=20.0, batch_size=32)
    return config


def unet() -> ConfigDict:
    """Architecture of the network that denoises: the UNet, unless `name` is another."""
    return ConfigDict(
        dict(
            # unet, or a DiT such as dit_b2: of size s, b, l or xl, with patches of 2, 4 or 8. Of these fields a DiT has
            # conditional, null_class, dropout, learned_variance, qk_norm, attention_chunk and remat; the others are the
            # UNet's alone.
            name="unet",
            channels=128,  # width of the first level
            channel_mult=(1, 2, 2, 2),  # one entry a level; 0.5 and the like are possible
            num_res_blocks=2,
            attention_resolutions=(16, 8),  # feature-map heights with attention blocks
            head_dim=64,  # channels of an attention head
            num_heads=0,  # of an attention block; 0 = as many as head_dim gives
            mid_attention=True,  # attention at the lowest resolution, between down and up
            conditional=True,  # on the class; without, context_tokens, label_dropout and guidance have to be 0
            null_class=True,  # a row of the class table for "no class", which guidance and label_dropout need
            context_tokens=4,  # that a class is embedded to for cross-attention; 0 = no cross-attention, as in a DiT
            dropout=0.0,
            learned_variance=False,  # twice the output channels, as ADM has; for diffusion.loss hybrid and vlb
            scale_shift_norm=True,  # timestep and class scale and shift the norms (ADM); False = are added (DDPM)
            resblock_updown=True,  # residual blocks halve and double the resolution (ADM); False = convolutions (DDPM)
            downsample_padding=1,  # of these convolutions: 1 = on all sides; 0 = bottom and right only (DDPM's code)
            norm_groups=32,  # of GroupNorm; fewer where they do not divide the channels
            norm_eps=1e-5,  # added to GroupNorm's variances
            freq_shift=0.0,  # frequencies of the timestep are 10000^(-i / (channels / 2 - freq_shift)); DDPM's code: 1
            cross_resolution=(),  # feature-map heights at which the up path attends to pooled maps of all levels
            qk_norm=False,  # queries and keys normalised, for attention whose logits would grow (large lr, bfloat16)
            attention_chunk=0,  # queries at a time where cuDNN's attention does not apply, for less memory; 0 = all
            remat="none",  # recomputed for less GPU memory: none, blocks (all inside), dots (but products with weights)
        )
    )


def diffusion() -> ConfigDict:
    """Forward process and its training."""
    return ConfigDict(
        dict(
            # linear, scaled_linear or cosine; in continuous time edm (time is sigma) or flow (straight lines)
            schedule="linear",
            num_steps=1000,  # T; edm and flow have none, and no betas
            beta_start=2e-4,  # at T = 1000, as beta_end; the cosine schedule has neither
            beta_end=0.02,
            noise_shift=1.0,  # factor of noise / signal at every time, as resolution / 64; not for edm
            zero_terminal_snr=False,  # the last timestep is pure noise: not with prediction eps, nor leading steps
            prediction="eps",  # of the network: eps, x0, v, flow (eps - x0) or edm (preconditioned)
            sigma_data=0.5,  # deviation of the data that prediction and weighting edm assume; 1 for whitened latents
            loss="mse",  # of the prediction; hybrid: also the bound of the learned variance; vlb: the bound alone
            weighting="simple",  # of the squared error: simple (1 on what is predicted), min_snr, p2 or edm
            weighting_gamma=0.0,  # of min_snr and p2; 0 = as published, 5 and 1
            time_sampling="uniform",  # importance (for loss vlb); edm: lognormal; flow: uniform or logit_normal
            time_normal=(),  # mean and deviation of the two; () = as published, (-1.2, 1.2) and (0, 1)
            stratified=False,  # times spread evenly over a batch: less noise in the gradient
            label_dropout=0.1,  # share of labels replaced by the null class; guidance needs some
            scaling_factor=0.0,  # latents are multiplied by it; 0 = whitened by each channel's measured mean and std
        )
    )


def sample() -> ConfigDict:
    """How samples are drawn, during training and by --mode=sample."""
    return ConfigDict(
        dict(
            sampler="ddim",  # ddim (euler is the same), ddpm, ddpm_large, heun, dpmpp_1, dpmpp_2m or unipc
            steps=50,  # of the num_steps timesteps; heun evaluates the network twice in each but the last
            spacing="leading",  # leading, trailing, linspace, adm or dpm: which timesteps; edm: karras; flow: even
            eta=0.0,  # ddim: 0 = deterministic, 1 = as noisy as ddpm
            sigmas=(0.002, 80.0, 7.0),  # edm: smallest and largest sigma, and rho, the exponent of karras
            churn=(),  # edm with euler or heun: amount of noise before each step, and S_min, S_max, S_noise; () = none
            # w in (1+w) cond - w uncond, elsewhere written as s = 1 + w; in --mode=sample also several, as in (0.,1.5)
            guidance=number_or_several(0.0),
            guidance_interval=(),  # first and last time (timestep, sigma) with guidance, others cost half; () = all
            guidance_rescale=0.0,  # phi, share by which guided predictions get the spread of the conditional ones back
            autoguidance="",  # --mode=sample: workdir of a weaker model, to guide with in place of the null class
            autoguidance_step=0,  # its checkpoint; 0 = the newest
            clip=True,  # x0 predictions to [-1, 1]; latents have no such bounds
            classes="",  # names or numbers with commas between, repeated in turn; empty = all
            num=100,  # images
            batch_size=100,  # images computed at a time, rounded up to a multiple of the devices
            decode_batch=0,  # latents: images decoded at a time, rounded up to a multiple of the devices; 0 = all
            decode_tile=0,  # latents: side in latent pixels, 8 or more, of tiles decoded one at a time; 0 = whole
            weights="ema",  # ema, raw, ema:DECAY of ema_decays, or sigma_rel:WIDTH, any with snapshots
            seed=0,  # image k is a function of (seed, k)
            format="npz",  # npz (one array) or png (a folder)
        )
    )


def number_or_several(value: float | tuple[float, ...]) -> FieldReference:
    """A field that --config.FIELD sets to a number or a tuple, where other fields keep the type they have."""
    return FieldReference(value, field_type=object)


def guidance_weights(settings: ConfigDict) -> tuple[float, ...]:
    """All w of the fields `sample`, in their order."""
    w = settings.guidance
    return tuple(w) if isinstance(w, tuple | list) else (w,)


def evaluation(dataset: str) -> ConfigDict:
    """What a run measures when it ends, and --mode=evaluate measures."""
    config = ConfigDict(
        dict(
            scores=(),  # names in jaxdiff.evaluation.scores: fd, sfd, is, kid, precision_recall, nearest_train, ...
            num=0,  # samples that are scored; 0 = sample.num
            images="",  # --mode=evaluate: folder or .npz of images that are scored in place of samples
            steps=(),  # --mode=evaluate: several numbers of sampling steps, as in (50,100); empty = sample.steps
            extractor="effnet_lite0",  # of features: effnet_lite0 or inception
            inception="",  # file with the weights of the FID InceptionV3, .pth or .safetensors
            resize="pytorch",  # for inception: pytorch (as pytorch-fid) or tf1 (the original)
            reference="val",  # images that are compared with: val or train
            splits=10,  # parts that the inception score is the mean over
            k=3,  # neighbours of precision and recall
            nll=False,  # --mode=evaluate: also the bound on the likelihood of validation images, in bits/dim
            nll_num=0,  # images of these, of T evaluations each; 0 = all
            neighbours=0,  # samples, those nearest to training images, in a picture with the latter; 0 = none
            every=0,  # training steps between scores of `every_num` samples in the log; 0 = none
            every_num=100,
        )
    )
    if dataset == "digits":
        config.scores = ("fd", "knn_accuracy")
    else:
        config.update(scores=("fd", "sfd", "is", "kid", "precision_recall"), num=10_000)
    return config
