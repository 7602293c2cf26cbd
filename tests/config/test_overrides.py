"""Fields that nothing would look at are refused on the command line."""

import pytest
from ml_collections import ConfigDict

from configs import ladder, ldm_cfg
from jaxdiff.config.overrides import USED, check_overrides
from jaxdiff.errors import ConfigError


def test_fields_of_the_unet_are_not_given_for_a_dit():
    config = ConfigDict({"ldm": ldm_cfg.get_config("digits")})
    given = ["ldm.model.name", "ldm.model.dropout", "ldm.lr", "ldm.model.channels"]
    check_overrides(config, given)
    config.ldm.model.name = "dit_s2"
    check_overrides(config, given[:-1])
    line = "config.ldm.model.channels = 64: must be left out with ldm.model.name = 'dit_s2', which has of ldm.model"
    with pytest.raises(ConfigError, match=line):
        check_overrides(config, given)


ADVERSARY = {"autoencoder.disc_weight": 0.1}
EDM = {"diffusion.schedule": "edm", "diffusion.prediction": "edm"}


@pytest.mark.parametrize(
    ("field", "unused", "used"),
    [
        ("data.path", {}, {"data.source": "npz"}),
        ("data.prepared", {"data.source": "npz"}, {"data.source": "folder"}),
        ("diffusion.beta_start", {"diffusion.schedule": "cosine"}, {"diffusion.schedule": "scaled_linear"}),
        ("diffusion.beta_end", EDM, {"diffusion.schedule": "linear"}),
        ("diffusion.sigma_data", {}, EDM),
        ("sample.sigmas", {"diffusion.schedule": "flow"}, EDM),
        ("model.downsample_padding", {}, {"model.resblock_updown": False}),
        ("autoencoder.disc_start", {}, ADVERSARY),
        ("autoencoder.disc_layers", {}, ADVERSARY),
        ("eval.k", {}, {"eval.scores": ("fd", "precision_recall")}),
        ("eval.splits", {}, {"eval.scores": ("is",)}),
        ("eval.nll_num", {}, {"eval.nll": True}),
        ("eval.every_num", {}, {"eval.every": 5}),
    ],
)
def test_fields_that_nothing_would_look_at(field, unused, used):
    assert field in USED
    config = ldm_cfg.get_config("digits")
    config.update_from_flattened_dict(unused)
    other = USED[field][0]
    line = rf"^config.{field} = .*: must be left out with {other} = "
    with pytest.raises(ConfigError, match=line):
        check_overrides(config, ["lr", field])
    check_overrides(config, ["lr"])
    config.update_from_flattened_dict(used)
    check_overrides(config, [field])


def test_fields_of_a_ladder_s_training_that_nothing_would_look_at():
    config = ladder.get_config("digits")
    check_overrides(config, ["ddpm.diffusion.beta_start", "eval.scores", "minutes"])
    config.ldm.diffusion.schedule = "cosine"
    line = "config.ldm.diffusion.beta_end = 0.02: must be left out with ldm.diffusion.schedule = 'cosine'"
    with pytest.raises(ConfigError, match=line):
        check_overrides(config, ["ldm.diffusion.beta_end"])
