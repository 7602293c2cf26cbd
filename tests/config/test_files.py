"""Configs on disk: they come back, and say whose a workdir is."""

import json
import pathlib

import pytest

from configs import ddpm, ldm_cfg, vae
from jaxdiff.config import files
from jaxdiff.errors import ConfigError


def test_a_config_comes_back_from_its_file(tmp_path):
    for module in (ldm_cfg, ddpm, vae):
        config = module.get_config("digits")
        files.save(config, tmp_path / "config.json")
        assert files.load(tmp_path / "config.json").to_dict() == config.to_dict()
    config = ldm_cfg.get_config("digits")
    for guidance in (3.0, (0.0, 1.5), 2):  # of either type, before and after
        config.sample.guidance = guidance
        files.save(config, tmp_path / "config.json")
        config = files.load(tmp_path / "config.json")
        assert config.sample.guidance == guidance


def test_whose_a_workdir_is(tmp_path):
    config = ldm_cfg.get_config("digits")
    files.claim_workdir(config, tmp_path / "run")
    config.update_from_flattened_dict(
        {"sample.steps": 7, "data.path": "moved", "data.threads": 1, "log_every": 1, "autoencoder.train.keep": 9}
    )
    config.model.update(remat="blocks", attention_chunk=16)
    files.claim_workdir(config, tmp_path / "run")  # all of these may change
    assert files.load(tmp_path / "run" / "config.json").sample.steps == 7
    for field, value in (("model.channels", 256), ("autoencoder.path", "x"), ("data.flip", True), ("seed", 1)):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict({field: value})
        with pytest.raises(ConfigError, match=rf"config.{field} = {value!r}: .* was made with"):
            files.claim_workdir(other, tmp_path / "run")
        assert files.load(tmp_path / "run" / "config.json") == config
    with pytest.raises(ConfigError, match="config.experiment = 'ddpm': .* was made with 'ldm'"):
        files.claim_workdir(ddpm.get_config("digits"), tmp_path / "run")


def test_a_workdir_of_an_earlier_version(tmp_path):
    config = ldm_cfg.get_config("digits")
    config.autoencoder.update(norm_groups=32, scores=())
    files.claim_workdir(config, tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())
    for field in files.ADDED_FIELDS:
        *parts, name = field.split(".")
        group = old
        for part in parts:
            group = group[part]
        del group[name]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert files.load(tmp_path / "config.json") == config
    files.check_workdir(config, tmp_path)
    config.autoencoder.norm_groups = 8
    with pytest.raises(ConfigError, match="config.autoencoder.norm_groups = 8: .* was made with 32"):
        files.check_workdir(config, tmp_path)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_workdir_is_left_alone(tmp_path: pathlib.Path, kind):
    precious = tmp_path / "x" if kind == "file" else tmp_path / "x" / "thesis.tex"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is not a jaxdiff workdir"):
        files.claim_workdir(ldm_cfg.get_config("digits"), tmp_path / "x")
    assert precious.read_text() == "years of work" and len(list(tmp_path.rglob("*"))) == (1 if kind == "file" else 2)
