"""What the modes of the command line do before and around the work proper."""

import os
import pathlib
import shlex
from collections.abc import Collection, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdiff import mesh as meshes
from jaxdiff.build import build_autoencoder, build_network
from jaxdiff.config import check, files
from jaxdiff.config.overrides import check_overrides
from jaxdiff.config.require import require
from jaxdiff.errors import ConfigError

REPORT = "report.html"


def start() -> None:
    """Join the other processes of the run, and keep compiled programs for the next start."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(files.cache_root() / "xla"))
    # Programs of several devices have pointers to Python in them, for cuDNN's attention and our norms, with which none
    # would be found again. Without them attention differs by its shapes, and norms by a number of their own.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    meshes.initialize_distributed()


def train(config: ConfigDict, workdir: pathlib.Path, overrides: Collection[str] = ()) -> None:
    """--mode=train, for a config as it came from the command line, which gives the fields `overrides`."""
    from jaxdiff.training.stages import run_train

    start()
    check.validate(config, jax.device_count())
    check_overrides(config, overrides)
    files.check_workdir(config, workdir)
    run_train(config, workdir)
    try_report([workdir], workdir / REPORT)


def ladder(config: ConfigDict, workdir: pathlib.Path, overrides: Collection[str] = ()) -> None:
    """--mode=ladder, for a config as it came from the command line, which gives the fields `overrides`."""
    from jaxdiff.ladder.climb import run_ladder
    from jaxdiff.ladder.rungs import check_workdir, validate

    start()
    validate(config, jax.device_count())
    check_overrides(config, overrides)
    check_workdir(config, workdir)
    run_ladder(config, workdir)
    try_report([workdir], workdir / REPORT)


def prepare(config: ConfigDict) -> None:
    """--mode=prepare: store the data set's images as records; says where, and what was left out."""
    from jaxdiff.data.prepare import prepare as store

    check.validate_data(config)
    root, manifest = store(config.data)
    counts = ", ".join(f"{count:,} {split}" for split, count in manifest["images"].items())
    print(f"{root}: {counts} images of {config.data.image_size} pixels in {len(manifest['classes'])} classes")
    if manifest["rejected"]:
        print(f"left out: {manifest['rejected']:,} images, see {root / 'rejected.jsonl'}")
    for split, ignored in manifest["ignored_files"].items():
        if ignored:
            print(f"{split}: passed over {sum(ignored.values()):,} other files ({', '.join(sorted(ignored))})")


def encode(config: ConfigDict, workdir: pathlib.Path) -> None:
    """--mode=encode, for a config as it came from the command line."""
    from jaxdiff.sampling import check_autoencoder
    from jaxdiff.training.stages import run_encode

    if config.experiment != "ldm":
        raise ConfigError(f"--mode=encode: {config.name} has no latents; give a config such as configs/ldm_cfg.py")
    start()
    check.validate(config, jax.device_count())
    check_autoencoder(config, files.autoencoder_folder(config, workdir))
    run_encode(config, workdir)


def import_model(config: ConfigDict, workdir: pathlib.Path, source: pathlib.Path, overrides: dict[str, Any]) -> None:
    """--mode=import: `workdir` becomes that of `config`'s training, with the network in the folder `source`.

    Args: overrides, the fields that the command line gives, which may not contradict the network.
    """
    from jaxdiff.data import load_source
    from jaxdiff.interop.diffusers import load_autoencoder
    from jaxdiff.interop.importing import import_unet, read_unet
    from jaxdiff.sampling import check_autoencoder
    from jaxdiff.training.stages import run_import

    start()
    if config.experiment == "ldm":
        path = config.autoencoder.path
        require(bool(path), "autoencoder.path", path, "the autoencoder's workdir, from --config=configs/vae.py")
        check_autoencoder(config, files.autoencoder_folder(config, workdir))
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError(f"--workdir={workdir}: exists and is not empty; give another")
    check.validate_data(config)
    train, val = load_source(config.data, "train"), load_source(config.data, "val")
    if config.experiment == "vae":
        own, params = load_autoencoder(source)
        fields = {f"autoencoder.{name}": value for name, value in own.items()}
    else:
        shape, num_classes = [config.data.image_size, config.data.image_size, 3], len(train.class_names)
        if config.experiment == "ldm":
            autoencoder = build_autoencoder(config)
            shape = [shape[0] // autoencoder.downsampling] * 2 + [autoencoder.latent_channels]
        foreign = read_unet(source, shape, num_classes)
        fields = foreign.fields
    for name, value in overrides.items():
        if fields.get(name, value) != value:
            raise ConfigError(f"config.{name} = {value!r}: must be {fields[name]!r}, as in {source}, or left out")
    preset = files.flatten(config)
    config.update_from_flattened_dict(fields)
    check.validate(config, jax.device_count())
    if config.experiment != "vae":
        if config.experiment == "ldm":
            scale = config.diffusion.scaling_factor
            allowed = "positive: what the network's pipeline multiplies latents by"
            require(scale > 0, "diffusion.scaling_factor", scale, allowed)
        params = import_unet(foreign, build_network(config, shape[-1], num_classes), shape, str(source))
    run_import(config, workdir, params, train, val)

    def flags(values: dict[str, Any]) -> str:
        return " ".join(f"--config.{name}={str(value).replace(' ', '')!r}" for name, value in values.items())

    if config.experiment == "vae":
        hint = f"for latent diffusion: {shlex.quote(f'--config.autoencoder.path={workdir}')} {flags(fields)}"
    else:
        d = config.diffusion
        betas = "" if d.schedule == "cosine" else f", betas {d.beta_start:g} to {d.beta_end:g}"
        changed = flags({name: value for name, value in fields.items() if preset[name] != value})
        schedule = f"noise schedule {d.schedule}{betas} over {d.num_steps} steps"
        hint = f"{schedule}; flags to train on, besides these: {changed}"
    meshes.say(f"imported {source} to {workdir}; {hint}")


def export_model(
    workdir: pathlib.Path, target: pathlib.Path, named: str | None, overrides: dict[str, Any], step: int | None
) -> None:
    """--mode=export: the networks of a workdir, with the averaged or (sample.weights) raw parameters, as the diffusers
    folder `target`; the other arguments, and errors, as in `sample`."""
    from jaxdiff.interop.diffusers import save_autoencoder
    from jaxdiff.interop.pipeline import save_pipeline
    from jaxdiff.sampling import load_autoencoder, load_generator

    config = workdir_config(workdir, named, overrides)
    start()
    mesh = meshes.make_mesh()
    if "sample" not in config:
        params = meshes.to_host(load_autoencoder(config, workdir, mesh, step))
        if meshes.is_main():
            save_autoencoder(build_autoencoder(config), params, config.data.image_size, target)
        loads = "diffusers.AutoencoderKL.from_pretrained reads it"
    else:
        check.validate_sample(config)
        generator, params, _ = load_generator(config, workdir, mesh, step)
        decoder, autoencoder = generator.decoder, None
        if decoder is not None:
            autoencoder = build_autoencoder(config), meshes.to_host(decoder.params), decoder.whitening
        params = meshes.to_host(params)
        if meshes.is_main():
            save_pipeline(config, generator.network, params, generator.shape, target, autoencoder=autoencoder)
        loads = f"diffusers.UNet2DModel.from_pretrained reads {target / 'unet'}"
        if not config.model.conditional:
            loads = f"diffusers.DiffusionPipeline.from_pretrained reads it, {loads}"
    meshes.say(f"exported {workdir} to {target}; {loads}")


def workdir_config(
    workdir: pathlib.Path, named: str | None, overrides: dict[str, Any], allowed: Sequence[str] = files.SAMPLE_FIELDS
) -> ConfigDict:
    """The config of a workdir, with `overrides` of its fields in the groups `allowed`, or that are themselves in it.

    Raises: ConfigError when there is none, fields of others are given, or the --config that was `named` is another.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ConfigError(f"--workdir={workdir}: no config.json there; give the workdir of a training run")
    config = files.load(path)
    if config.experiment == "ladder":
        runs = ", ".join(sorted(str(found.parent) for found in workdir.glob("*/config.json")))
        raise ConfigError(
            f"--workdir={workdir}: is a ladder's; give that of one of its trainings: {runs or 'none has begun'}"
        )
    if named not in (None, config.name):
        raise ConfigError(f"--config: {workdir} was made with {config.name}, not {named}; leave --config out")
    for field in overrides:
        if not {field, field.split(".")[0]} & set(allowed) or "sample" not in config:
            groups = ", ".join(name if "." in name else f"{name}.*" for name in allowed)
            only = f"only {groups} can" if "sample" in config else "an autoencoder has nothing to sample"
            raise ConfigError(f"--config.{field}: cannot change in this --mode; {only}")
    config.update_from_flattened_dict(overrides)
    return config


def sample(workdir: pathlib.Path, named: str | None, overrides: dict[str, Any], step: int | None) -> None:
    """--mode=sample: the config is the workdir's own, with `overrides` of its fields `sample.*`.

    Raises: ConfigError as in `workdir_config`, and for a workdir of an autoencoder alone.
    """
    from jaxdiff.sampling import run_sample

    config = workdir_config(workdir, named, overrides)
    if "sample" not in config:
        raise ConfigError(f"--workdir={workdir}: holds an autoencoder alone, which has nothing to sample")
    start()
    check.validate_sample(config)
    check_overrides(config, overrides)
    for sheet in run_sample(config, workdir, step):
        meshes.say(f"sample grid: {sheet}")


def evaluate(workdir: pathlib.Path, named: str | None, overrides: dict[str, Any], step: int | None) -> None:
    """--mode=evaluate: score a checkpoint of a workdir, or the images `eval.images`; arguments, and errors, as in
    `sample`, but that eval.* and where the data are may change as well."""
    from jaxdiff.evaluation.evaluate import run_evaluate

    config = workdir_config(workdir, named, overrides, files.EVALUATE_FIELDS)
    if "sample" not in config:
        raise ConfigError(f"--workdir={workdir}: holds an autoencoder alone, which is scored when its training ends")
    e = config.eval
    if not (e.scores or e.neighbours or e.nll):
        raise ConfigError("config.eval.scores = (): must name what to measure, as in --config.eval.scores='(\"fd\",)'")
    if e.images:  # there is nothing to draw
        drawing = ("eval.steps", "eval.num", "eval.nll", "eval.nll_num")
        given = [f"--config.{field}" for field in overrides if field in drawing or field.startswith("sample.")]
        given += ["--step"] if step is not None else []
        if given:
            raise ConfigError(f"config.eval.images = {e.images!r}: must be left out with {given[0]}")
    start()
    check.validate_data(config)
    check.validate_sample(config)
    check.validate_eval(config)
    check_overrides(config, overrides)
    run_evaluate(config, workdir, step)


def report(workdirs: Sequence[pathlib.Path], target: pathlib.Path | None) -> None:
    """--mode=report: one page about the workdirs, for a ladder's all its rungs; `target` may be left out for one.
    Errors as in `write_report`."""
    from jaxdiff.report import write_report

    if target is None and len(workdirs) > 1:
        raise ConfigError("--to=: must name the file to write, where there are several workdirs")
    print(f"report: {write_report(workdirs, target or workdirs[0] / REPORT)}")


def try_report(workdirs: Sequence[pathlib.Path], target: pathlib.Path) -> None:
    """The report at the end of a run, which has not failed when its report does."""
    if not meshes.is_main():
        return
    from jaxdiff.report import write_report

    try:
        print(f"report: {write_report(workdirs, target)}")
    except Exception as error:  # whatever it is, all results are there, and --mode=report shows what is wrong
        print(f"report: could not be made: {type(error).__name__}: {error}")
