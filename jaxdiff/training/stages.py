"""--mode=train: the stages of an experiment one after the other, each skipped where it is finished."""

import contextlib
import functools
import pathlib
import shlex
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxdiff import images
from jaxdiff import mesh as meshes
from jaxdiff.build import build_autoencoder
from jaxdiff.config import files
from jaxdiff.config.require import require
from jaxdiff.data import load_source
from jaxdiff.data.latents import Encoding, Whitening, encode_sources, latent_root, params_hash
from jaxdiff.data.sources import Source
from jaxdiff.evaluation import reconstruction
from jaxdiff.evaluation.evaluate import Scorer, with_fields
from jaxdiff.evaluation.judge import Judge
from jaxdiff.evaluation.records import FILE as SCORES_FILE
from jaxdiff.evaluation.records import write_validation
from jaxdiff.generator import Decoder, Generator
from jaxdiff.keys import named_key
from jaxdiff.mesh import say
from jaxdiff.samples import label_names, sample_labels, save_real, save_samples
from jaxdiff.sampling import check_autoencoder, load_autoencoder
from jaxdiff.training.averages import updates
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.environment import record_start
from jaxdiff.training.experiments import Experiment, autoencoder_experiment, diffusion_experiment
from jaxdiff.training.loop import Result, fit
from jaxdiff.training.optimizer import recipe_optimizer, total_steps
from jaxdiff.training.snapshots import state_weights
from jaxdiff.training.step import new_state

WATCHED = 8  # samples whose way from noise is kept


def run_train(config: ConfigDict, workdir: pathlib.Path, *, stop_at: int | None = None) -> dict[str, float]:
    """Train `config` (checked) in `workdir` to its end; its scores. Started again, it goes on."""
    begin = time.monotonic()
    mesh = meshes.make_mesh()
    say(f"{config.name} on {mesh.size} x {mesh.devices.flat[0].device_kind}, workdir {workdir}")
    train, val = load_source(config.data, "train"), load_source(config.data, "val")
    say(f"{len(train):,} training and {len(val):,} validation images in {len(train.class_names)} classes")
    _check(config, workdir, train)
    judge = None if config.experiment == "vae" else Judge(config.eval, train, val, mesh)
    if judge:
        judge.check(config.eval.num or config.sample.num)
    with contextlib.ExitStack() as held:
        if meshes.is_main():  # not before the data were found and all is checked: a mistake leaves nothing behind
            held.enter_context(files.training_in(config, workdir))
            record_start(workdir, mesh)
        meshes.barrier("workdir")
        scores = _run_stages(config, workdir, train, val, mesh, judge, stop_at)
    say(f"{time.monotonic() - begin:.0f} s in all; checkpoints: {workdir / 'checkpoints'}")
    return scores


def _run_stages(
    config: ConfigDict,
    workdir: pathlib.Path,
    train: Source,
    val: Source,
    mesh: Mesh,
    judge: Judge | None,
    stop_at: int | None,
) -> dict[str, float]:
    """All trainings, and what comes of the last one; the autoencoder's alone without a judge."""
    if judge is None:
        return _train_autoencoder(config, workdir, train, val, mesh, stop_at)
    experiment, generator = diffusion_stage(config, workdir, train, val, mesh)
    scorer = Scorer(config, workdir, generator, judge, train.class_names)
    if config.eval.every:
        settings = with_fields(config.sample, num=config.eval.every_num)
        experiment = experiment._replace(score=lambda params: scorer.scalars(params, settings))
    result = fit(experiment, config, workdir, mesh, stop_at=stop_at)
    return _finish(config, workdir, generator, scorer, result, train, val)


def _check(config: ConfigDict, workdir: pathlib.Path, train: Source) -> None:
    """What can be checked only with the data, or the autoencoder's workdir, at hand."""
    recipes = {"": config}
    if config.experiment == "ldm":
        if config.autoencoder.path:
            check_autoencoder(config, files.autoencoder_folder(config, workdir))
        else:
            recipes["autoencoder.train."] = config.autoencoder.train
    for prefix, recipe in recipes.items():
        total = total_steps(recipe, len(train))
        allowed = f"less than the {total} steps of the run"
        require(recipe.warmup_steps < total, f"{prefix}warmup_steps", recipe.warmup_steps, allowed)
    if "sample" in config:
        sample_labels(config.sample, label_names(config, train.class_names))


def vae_config(config: ConfigDict) -> ConfigDict:
    """The configs/vae.py experiment that is the first stage of a latent-diffusion config."""
    vae = ConfigDict({k: config[k] for k in ("seed", "dtype", "data")})
    vae.name, vae.experiment = f"vae-{config.name.split('-', 1)[1]}", "vae"
    vae.autoencoder = ConfigDict({k: v for k, v in config.autoencoder.items() if k not in ("path", "latents", "train")})
    vae.update(config.autoencoder.train)
    return vae


def diffusion_stage(
    config: ConfigDict, workdir: pathlib.Path, train: Source, val: Source, mesh: Mesh
) -> tuple[Experiment, Generator]:
    """The UNet's training, after the stages that it builds on: none in pixels."""
    if config.experiment == "ddpm":
        return diffusion_experiment(config, train, val, mesh)
    decoder, latents = _latent_stages(config, workdir, train, val, mesh)
    folder = files.seen_from(config, workdir)
    return diffusion_experiment(config, *latents, mesh, decoder=decoder, autoencoder=folder)


def _latent_stages(
    config: ConfigDict, workdir: pathlib.Path, train: Source, val: Source, mesh: Mesh
) -> tuple[Decoder, tuple[Source, Source]]:
    """Autoencoder (stage 1) and encoding (stage 2): the decoder, and the latents of train and val."""
    folder = files.autoencoder_folder(config, workdir)
    if not config.autoencoder.path:
        own = vae_config(config)
        if meshes.is_main():
            files.claim_workdir(own, folder)
        meshes.barrier("autoencoder workdir")
        if not (folder / SCORES_FILE).exists():
            if meshes.is_main():
                record_start(folder, mesh)
            _train_autoencoder(own, folder, train, val, mesh)
    return encode_data(config, folder, train, val, mesh)


def _train_autoencoder(
    config: ConfigDict, workdir: pathlib.Path, train: Source, val: Source, mesh: Mesh, stop_at: int | None = None
) -> dict[str, float]:
    """Train the autoencoder of a configs/vae.py experiment to its end; its scores on the validation images."""
    result = fit(autoencoder_experiment(config, train, val, mesh), config, workdir, mesh, stop_at=stop_at)
    scores = dict(result.validation)
    for name in config.autoencoder.scores:
        scores |= reconstruction.SCORES[name](build_autoencoder(config), result.state.ema, val, mesh)
    say(f"autoencoder: {_table(scores)}  (ema weights)")
    if meshes.is_main():
        write_validation(workdir, scores, len(val))
    return scores


def encode_data(
    config: ConfigDict, folder: pathlib.Path, train: Source, val: Source, mesh: Mesh
) -> tuple[Decoder, tuple[Source, Source]]:
    """The latents of train and val by the autoencoder in the workdir `folder`, computed unless they are stored."""
    params = load_autoencoder(config, folder, mesh)
    model = build_autoencoder(config)
    side = config.data.image_size // model.downsampling

    @jax.jit
    def encode(params: Any, batch: Any) -> Any:
        return model.apply(params, images.from_batch(batch), method="encode")

    sources = {"train": train, "val": val}
    encoding = Encoding(
        encode=functools.partial(encode, params),
        autoencoder=params_hash(meshes.to_host(params)),
        shape=(side, side, model.latent_channels),
        mirrored=config.data.flip,
        batch_size=-(-config.autoencoder.train.batch_size // mesh.size) * mesh.size,  # it may be of another machine
    )
    chosen = config.autoencoder.latents
    root = pathlib.Path(chosen) if chosen else latent_root(folder, sources, encoding.mirrored)
    data = config.data
    latents, whitening = encode_sources(root, sources, encoding, mesh, cache_gb=data.cache_gb, threads=data.threads)
    say(f"latents of {len(train):,} training and {len(val):,} validation images: {root}")
    if scale := config.diffusion.scaling_factor:
        whitening = Whitening([0.0] * model.latent_channels, [1 / scale] * model.latent_channels)
    return Decoder(params, whitening), (latents["train"], latents["val"])


def run_encode(config: ConfigDict, workdir: pathlib.Path) -> None:
    """--mode=encode: store the latents of the data set by the autoencoder that is given, or that of `workdir`."""
    mesh = meshes.make_mesh()
    train, val = load_source(config.data, "train"), load_source(config.data, "val")
    encode_data(config, files.autoencoder_folder(config, workdir), train, val, mesh)


def run_import(config: ConfigDict, workdir: pathlib.Path, params: Any, train: Source, val: Source) -> None:
    """Make the workdir of a training of `config` that has these parameters, and no step behind it."""
    mesh = meshes.make_mesh()
    if config.experiment == "vae":
        experiment = autoencoder_experiment(config, train, val, mesh)
    else:
        experiment, _ = diffusion_stage(config, workdir, train, val, mesh)
    optimizer, _ = recipe_optimizer(config, total_steps(config, len(train)))
    inner, others = experiment.objective, tuple(updates(config))
    create = functools.partial(
        new_state, optimizer=optimizer, critic=inner.critic, averages=others, memory=inner.memory
    )
    key = named_key(config.seed, "init")
    state = jax.jit(create, out_shardings=meshes.replicated(mesh))(meshes.put_replicated(params, mesh), key=key)
    checkpoints = Checkpoints(workdir, config.keep)
    position = {"batches": 0, "images": len(train)}
    checkpoints.save(state, {**experiment.meta, "data": position})
    checkpoints.close()
    if meshes.is_main():  # last of all: what was interrupted is no workdir, in which training would begin anew
        files.save(config, workdir / "config.json")
    meshes.barrier("imported")


def _finish(
    config: ConfigDict,
    workdir: pathlib.Path,
    generator: Generator,
    scorer: Scorer,
    result: Result,
    train: Source,
    val: Source,
) -> dict[str, float]:
    """Draw the final samples, score them, and say where everything is."""
    settings, num = config.sample, config.eval.num or config.sample.num
    labels = scorer.labels(settings)
    params = state_weights(result.state, settings.weights, config)
    samples, watch = scorer.draw(params, settings)
    shown = labels[:WATCHED]
    frames = generator.denoising(params, settings, shown)
    say(f"{_table(result.validation)}  (ema weights)")
    if meshes.is_main():
        named = labels if config.model.conditional else None
        sheet = save_samples(workdir / "samples" / "final", np.asarray(samples), named, settings)
        np.savez(workdir / "samples" / "denoising.npz", labels=shown, **frames)  # type: ignore[arg-type]
        save_real(workdir / "samples" / "real.npz", train)
        write_validation(workdir, result.validation, len(val))  # last: a ladder takes it for the end
        say(f"sample grid: {sheet}")
    scores = dict(result.validation)
    if config.eval.scores:
        drawn = (samples, watch) if num == settings.num else None
        step = int(result.state.step)
        scores |= scorer(params, with_fields(settings, num=num), step, drawn)["scores"]
    change = "guidance=3.0" if config.diffusion.label_dropout else "seed=1"
    where = shlex.quote(f"--workdir={workdir}")
    say(f"more samples: python -m jaxdiff.main --mode=sample {where} --config.sample.{change}")
    return scores


def _table(scores: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
