"""configs/ablations.py: every technique is possible wherever it is offered, and changes what it names only."""

import numpy as np
import pytest

from configs import ablations, ddpm, ldm_cfg
from jaxdiff.config import check, files
from jaxdiff.errors import ConfigError

BASES = {"ldm_cfg": ldm_cfg, "ddpm": ddpm}


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "imagenet100"])
@pytest.mark.parametrize("experiment", BASES)
@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_changes_what_it_names_only(name, experiment, dataset):
    if name == "global_attention" and experiment == "ldm_cfg" and dataset != "imagenet100":
        with pytest.raises(ConfigError, match="has attention at all its resolutions: .* higher one than (4|8)"):
            ablations.get_config(f"{name},{experiment},{dataset}")
        return
    config = ablations.get_config(f"{name},{experiment},{dataset}")
    check.validate(config, 1)
    base = BASES[experiment].get_config(dataset)
    named = ablations.ABLATIONS[name]
    named = named(base) if callable(named) else named
    before, after = files.flatten(base), files.flatten(config)
    changed = {field for field in after if after[field] != before[field]}
    assert changed - {"name"} == {field for field in named if named[field] != before[field]}
    assert config.name == f"{base.name}-{name}" and (changed != {"name"} or name == "base")


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("cosin", "NAME must be one of base, cosine"),
        ("cosine,vae", "EXPERIMENT must be one of ldm_cfg, ddpm"),
        ("cosine,ddpm,cifar", "the data set must be one of digits, cifar10"),
    ],
)
def test_unknown_choices(choice, words):
    with pytest.raises(ConfigError, match=words):
        ablations.get_config(choice)


def test_a_choice_may_be_short():
    assert ablations.get_config("flow").name == "ldm-digits-flow"
    assert ablations.get_config("flow,ddpm").name == "ddpm-digits-flow"


def test_edm_is_for_the_deviation_of_the_data():
    """Latents are whitened to 1, twice what EDM was published for: their signal-to-noise ratios are the same."""
    pixels, latents = (ablations.get_config(f"edm,{name},digits") for name in ("ddpm", "ldm_cfg"))
    assert (pixels.diffusion.sigma_data, latents.diffusion.sigma_data, latents.diffusion.scaling_factor) == (0.5, 1, 0)
    mean, std = latents.diffusion.time_normal
    assert np.exp(mean) == pytest.approx(2 * np.exp(-1.2)) and std == 1.2
    assert tuple(latents.sample.sigmas) == (2 * pixels.sample.sigmas[0], 2 * pixels.sample.sigmas[1], 7.0)
