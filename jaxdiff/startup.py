"""What the modes of the command line do before and around the work proper."""

import os
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxdiff import mesh as meshes
from jaxdiff.config import check, files
from jaxdiff.errors import ConfigError


def start() -> None:
    """Join the other processes of the run, and keep compiled programs for the next start."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "jaxdiff" / "xla"))
    meshes.initialize_distributed()


def train(config: ConfigDict, workdir: pathlib.Path) -> None:
    """--mode=train, for a config as it came from the command line."""
    from jaxdiff.training.stages import run_train

    start()
    check.validate(config, jax.device_count())
    files.check_workdir(config, workdir)
    run_train(config, workdir)


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
    from jaxdiff.training.stages import autoencoder_folder, run_encode

    if config.experiment != "ldm":
        raise ConfigError(f"--mode=encode: {config.name} has no latents; give a config such as configs/ldm_cfg.py")
    start()
    check.validate(config, jax.device_count())
    check_autoencoder(config, autoencoder_folder(config, workdir))
    run_encode(config, workdir)


def import_model(config: ConfigDict, workdir: pathlib.Path, source: pathlib.Path) -> None:
    """--mode=import: `workdir` becomes that of configs/vae.py with the autoencoder in the diffusers folder `source`."""
    from jaxdiff.interop.diffusers import load_autoencoder
    from jaxdiff.training.stages import run_import

    if config.experiment != "vae":
        raise ConfigError(f"--mode=import: {config.name} is no autoencoder; give --config=configs/vae.py:DATASET")
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError(f"--workdir={workdir}: exists and is not empty; give another")
    fields, params = load_autoencoder(source)
    config.autoencoder.update(fields)
    start()
    check.validate(config, jax.device_count())
    run_import(config, workdir, params)
    flags = " ".join(f"--config.autoencoder.{name}={str(value).replace(' ', '')!r}" for name, value in fields.items())
    meshes.say(f"imported {source} to {workdir}; for latent diffusion: --config.autoencoder.path={workdir} {flags}")


def export_model(workdir: pathlib.Path, target: pathlib.Path, step: int | None) -> None:
    """--mode=export: the averaged autoencoder of a workdir of configs/vae.py as the diffusers folder `target`."""
    from jaxdiff.build import build_autoencoder
    from jaxdiff.interop.diffusers import save_autoencoder
    from jaxdiff.sampling import load_autoencoder

    path = workdir / "config.json"
    if not path.exists() or files.load(path).experiment != "vae":
        raise ConfigError(f"--workdir={workdir}: must be a workdir of configs/vae.py; a latent model's own is in it")
    config = files.load(path)
    start()
    params = meshes.to_host(load_autoencoder(config, workdir, meshes.make_mesh(), step))
    if meshes.is_main():
        save_autoencoder(build_autoencoder(config), params, config.data.image_size, target)
    meshes.say(f"exported {workdir} to {target}; diffusers.AutoencoderKL.from_pretrained reads it")


def sample(workdir: pathlib.Path, named: str | None, overrides: dict[str, Any], step: int | None) -> None:
    """--mode=sample: the config is the workdir's own, with `overrides` of its fields `sample.*`.

    Raises: ConfigError as well when the --config that was `named` is another than the workdir's.
    """
    from jaxdiff.sampling import run_sample

    path = workdir / "config.json"
    if not path.exists():
        raise ConfigError(f"--workdir={workdir}: no config.json there; give the workdir of a training run")
    config = files.load(path)
    if "sample" not in config:
        raise ConfigError(f"--workdir={workdir}: holds an autoencoder alone, which has nothing to sample")
    if named not in (None, config.name):
        raise ConfigError(f"--config: {workdir} was made with {config.name}, not {named}; leave --config out")
    for field in overrides:
        if field.split(".")[0] not in files.SAMPLE_FIELDS:
            raise ConfigError(f"--config.{field}: cannot change in --mode=sample; only sample.* can")
    config.update_from_flattened_dict(overrides)
    start()
    check.validate_sample(config)
    for sheet in run_sample(config, workdir, step):
        meshes.say(f"sample grid: {sheet}")
