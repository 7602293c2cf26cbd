"""--mode=evaluate: records of a checkpoint at several settings, and of images that there are."""

import json
import shutil

import jax
import numpy as np
import pytest

from configs import ladder
from jaxdiff import mesh as meshes
from jaxdiff import startup
from jaxdiff.config import check, files
from jaxdiff.errors import ConfigError
from jaxdiff.evaluation.evaluate import run_evaluate
from jaxdiff.evaluation.records import add_record, is_of, read_scores, write_validation
from jaxdiff.generator import Generator
from jaxdiff.startup import workdir_config
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.step import TrainState


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    """As training leaves it, at step 3."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    config = tiny("ddpm")
    config.model.update(channels=8, channel_mult=(1,), attention_resolutions=(), head_dim=8)
    config.sample.update(num=20, batch_size=16)
    config.eval.scores = ("knn_accuracy",)
    folder.mkdir()
    files.save(config, folder / "config.json")
    names = [str(k) for k in range(10)]
    generator = Generator(config, (8, 8, 3), 10, meshes.make_mesh())
    leaves, structure = jax.tree.flatten(generator.abstract_params())
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(structure, [rng.normal(0, 0.2, leaf.shape).astype(np.float32) for leaf in leaves])
    params = meshes.put_replicated(params, meshes.make_mesh())
    checkpoints = Checkpoints(folder, keep=1)
    state = TrainState(np.int32(3), params, params, {"x": jax.tree.leaves(params)[0]})
    checkpoints.save(state, {"class_names": names, "shape": [8, 8, 3]})
    checkpoints.close()
    return folder


def evaluate(workdir, again=True, **overrides):
    overrides = {name.replace("__", "."): value for name, value in overrides.items()}
    config = workdir_config(workdir, None, overrides, files.EVALUATE_FIELDS)
    check.validate_eval(config)
    return run_evaluate(config, workdir, None, again=again)


def test_a_record_for_every_number_of_steps_and_weight(workdir, capsys):
    records = evaluate(workdir, sample__guidance=(0.0, 1.5), eval__steps=(2, 3))
    asked = [(r["protocol"]["steps"], r["protocol"]["guidance"]) for r in records]
    assert asked == [(2, 0.0), (2, 1.5), (3, 0.0), (3, 1.5)]
    stored = read_scores(workdir)
    assert stored["records"] == json.loads(json.dumps(records))
    for record in records:
        p = record["protocol"]
        assert p["num"] == 20 and p["step"] == 3 and p["weights"] == "ema" and p["labels"] == "all 10 in turn"
        assert p["dtype"] == "float32"
        assert record["seconds"]["sampling"] > 0 and (workdir / record["pictures"]["samples"]).exists()
    assert records[0]["seconds"]["compile"] > records[2]["seconds"]["compile"] == 0
    assert "20 samples of step 3, ddim 2 steps leading, eta 0, w = 1.5, ema weights, seed 0" in capsys.readouterr().out
    # Records of a version that did not say the dtype are of what is asked for, and are not computed again.
    older = [{**r, "protocol": {k: v for k, v in r["protocol"].items() if k != "dtype"}} for r in stored["records"]]
    files.write_json(workdir / "scores.json", {**stored, "records": older})
    assert evaluate(workdir, again=False, sample__guidance=(0.0, 1.5), eval__steps=(2, 3)) == older
    assert not is_of(records[0], {**records[0]["protocol"], "dtype": "bfloat16"})
    # The same again takes the place of what it repeats, picture and all; another number of samples does not.
    before = sorted((workdir / "samples").iterdir())
    evaluate(workdir, sample__guidance=1.5, eval__steps=(2,))
    assert len(read_scores(workdir)["records"]) == 4 and sorted((workdir / "samples").iterdir()) == before
    (other,) = evaluate(workdir, sample__guidance=1.5, eval__steps=(2,), eval__num=10)
    assert len(read_scores(workdir)["records"]) == 5 and other["protocol"]["num"] == 10


def test_images_that_there_are(workdir, tmp_path):
    from jaxdiff.data import load_source

    real = load_source(files.load(workdir / "config.json").data, "val").batch(np.arange(30))
    np.savez(tmp_path / "real.npz", arr_0=real["image"], arr_1=real["label"])
    (record,) = evaluate(workdir, eval__images=str(tmp_path / "real.npz"))
    assert record["scores"]["knn_accuracy"] > 0.9 and record["protocol"]["num"] == 30
    assert record["protocol"]["images"] == str(tmp_path / "real.npz") and len(record["protocol"]["sha256"]) == 64


@pytest.mark.parametrize("field", ["sample.steps", "eval.num", "eval.nll", "eval.steps"])
def test_nothing_is_asked_of_samples_where_there_are_images(workdir, field):
    given = {"eval.images": "x.npz", field: {"eval.nll": True, "eval.steps": (2,)}.get(field, 5)}
    with pytest.raises(ConfigError, match=f"eval.images = 'x.npz': must be left out with --config.{field}"):
        startup.evaluate(workdir, None, given, None)
    with pytest.raises(ConfigError, match="eval.images = 'x.npz': must be left out with --step"):
        startup.evaluate(workdir, None, {"eval.images": "x.npz"}, 3)


def test_damaged_scores_are_said_before_all_the_work(workdir, tmp_path, monkeypatch):
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "scores.json").write_text("{")
    monkeypatch.setattr(Generator, "sweep", None)  # whoever calls it fails
    with pytest.raises(ConfigError, match="scores.json: is damaged"):
        evaluate(tmp_path / "run")


@pytest.mark.parametrize("content", ["{}", "[]", '{"_class_name": "AutoencoderKL"}'])
def test_a_config_of_something_else(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="config.json: is not a config of jaxdiff"):
        workdir_config(tmp_path, None, {})


def test_a_ladder_s_workdir_names_its_trainings(tmp_path):
    files.save(ladder.get_config("digits"), tmp_path / "config.json")
    (tmp_path / "ddpm").mkdir()
    files.save(ladder.get_config("digits").ddpm, tmp_path / "ddpm" / "config.json")
    with pytest.raises(ConfigError, match=f"is a ladder's; give that of one of its trainings: {tmp_path}/ddpm$"):
        workdir_config(tmp_path, None, {})


def test_only_what_is_drawn_and_measured_can_change(workdir):
    workdir_config(workdir, None, {"data.path": "elsewhere"}, files.EVALUATE_FIELDS)
    with pytest.raises(ConfigError, match="config.model.channels: cannot change.*only sample.*, eval.*, data.path"):
        workdir_config(workdir, None, {"model.channels": 4}, files.EVALUATE_FIELDS)


def test_scores_of_earlier_versions_are_validation(tmp_path):
    (tmp_path / "scores.json").write_text('{"val_loss": 1.5}')
    record = {"protocol": {"num": 1}, "scores": {"x": 1.0}}
    add_record(tmp_path, record)
    assert read_scores(tmp_path) == {"validation": {"val_loss": 1.5}, "records": [record]}
    write_validation(tmp_path, {"val_loss": 1.0}, 297)
    assert read_scores(tmp_path) == {"validation": {"val_loss": 1.0, "val_images": 297}, "records": [record]}
    add_record(tmp_path, {**record, "scores": {"x": 2.0}})
    assert read_scores(tmp_path)["records"] == [{**record, "scores": {"x": 2.0}}]
    assert read_scores(tmp_path / "none") == {"validation": {}, "records": []}
