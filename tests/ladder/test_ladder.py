"""The ladder: steps from a budget, tables from files, mistakes in a line, and a climb that is stopped and goes on."""

import os
import signal

import jax
import pytest

from configs import ladder as preset
from jaxdiff.config import files
from jaxdiff.errors import ConfigError, Interrupted
from jaxdiff.ladder import climb
from jaxdiff.ladder.results import results
from jaxdiff.ladder.rungs import check_workdir, read_ladder, rung_config, rung_names, validate
from jaxdiff.training.pace import Length, Pace, choose_steps, with_steps
from tests.ladder.synthetic import lay, record


def test_steps_are_what_the_seconds_allow_within_recipe_and_minimum():
    pace = Pace(step_seconds=0.5, compile_seconds=10.0)
    assert choose_steps(pace, 60.0, recipe=1500, least=20) == Length(100, "budget")
    assert choose_steps(pace, 1e6, recipe=1500, least=20) == Length(1500, "recipe")
    assert choose_steps(pace, 12.0, recipe=1500, least=20) == Length(20, "minimum")
    assert choose_steps(pace, -5.0, recipe=1500, least=20) == Length(20, "minimum")
    assert choose_steps(pace, 60.0, recipe=15, least=20) == Length(15, "recipe")  # no more than the recipe, ever
    assert choose_steps(pace, 0.0, recipe=15, least=20) == Length(15, "minimum")


def test_what_comes_every_so_many_steps_shrinks_with_them(tiny):
    config = tiny("ddpm")
    config.update(
        epochs=2.0, steps=0, batch_size=10, warmup_steps=30, sample_every=0, checkpoint_every=100, log_every=50
    )
    with_steps(config, 60, 1500)  # of 300
    assert (config.epochs, config.steps, config.warmup_steps) == (0.0, 60, 6)
    assert (config.sample_every, config.checkpoint_every, config.log_every) == (0, 20, 6)
    config.warmup_steps = 60
    with_steps(config, 1, 1500)
    assert (config.steps, config.warmup_steps, config.checkpoint_every, config.log_every) == (1, 0, 1, 1)


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "imagenet100", "tfds:imagenette/320px-v2"])
def test_presets_are_possible_and_shares_leave_time_to_sample(dataset):
    config = preset.get_config(dataset)
    validate(config, 1)
    given = {name for name, share in config.shares.items() if share}
    assert given == set(rung_names(config)) and 0.5 < sum(config.shares.values()) < 0.9
    assert set(config.shares) == {"autoencoder", "ddpm", "ldm", *config.techniques}
    changed = {field for technique in config.techniques.values() for field in files.flatten(technique)}
    assert {"diffusion.schedule", "model.learned_variance", "model.cross_resolution"} < changed


def test_a_technique_changes_its_fields_and_shares_the_autoencoder():
    config = preset.get_config()
    base, cosine = (files.flatten(rung_config(config, name)) for name in ("ldm", "cosine"))
    differ = {field for field in base if base[field] != cosine[field]}
    assert differ == {"name", "diffusion.schedule"} and base.keys() == cosine.keys()
    config.shares.cosine = 0.0
    assert rung_names(config) == ["autoencoder", "ddpm", "ldm"]


def test_a_ladder_can_be_moved_with_its_autoencoder(tmp_path):
    own, workdir = rung_config(preset.get_config(), "ldm"), tmp_path / "ladder" / "ldm"
    workdir.mkdir(parents=True)
    files.claim_workdir(own, workdir)
    assert files.autoencoder_folder(own, workdir) == tmp_path / "ladder" / "autoencoder"
    moved = (tmp_path / "ladder").rename(tmp_path / "moved") / "ldm"
    assert files.autoencoder_folder(files.load(moved / "config.json"), moved) == tmp_path / "moved" / "autoencoder"
    assert files.seen_from(own, moved) == "../autoencoder"
    files.claim_workdir(own, moved)
    # A ladder of an earlier version, which names the place: it goes on there, and only there.
    older = rung_config(preset.get_config(), "ldm")
    older.autoencoder.path = str(tmp_path / "moved" / "autoencoder")
    assert files.seen_from(older, moved) == older.autoencoder.path
    files.save(older, moved / "config.json")
    files.check_workdir(own, moved)
    elsewhere = moved.parent.rename(tmp_path / "elsewhere") / "ldm"
    with pytest.raises(
        ConfigError, match=r"config.autoencoder.path = '{workdir}.*': .*elsewhere.* was made with '.*moved.*'"
    ):
        files.check_workdir(own, elsewhere)


def test_a_ladder_of_an_earlier_version_is_read_with_the_fields_that_are_younger(tmp_path):
    config = preset.get_config()
    lay(tmp_path, config, [record(config, "ddpm")])
    text = (tmp_path / "config.json").read_text()
    assert text.count('"guidance_rescale": 0.0,') == 2 and text.count('"every": 0,') == 1
    (tmp_path / "config.json").write_text(text.replace('"guidance_rescale": 0.0,', "").replace('"every": 0,', ""))
    assert files.flatten(files.load(tmp_path / "config.json")) == files.flatten(config)
    del (older := record(config, "ddpm"))["protocol"]["guidance_rescale"]
    files.write_json(tmp_path / "ddpm" / "scores.json", {"records": [older]})
    assert [line[1] for line in lines_of(results(tmp_path), "1. DDPM")[2:]] == ["40", ""]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("minutes", 0.0, "config.minutes = 0.0: must be positive"),
        ("shares.ddpm", 0.9, "must be at most 1 in all, and is 1.26"),
        ("shares.ddpm", 0.0, "config.shares.ddpm = 0.0: must be positive"),
        ("shares.dppm", 0.1, "config.shares.dppm = 0.1: must be of one of autoencoder, ddpm, ldm, combined, cosine"),
        ("guidance", (0.0, 2.0), "config.guidance = (0.0, 2.0): must be positive weights"),
        ("eval.steps", (), "config.eval.steps = (): must be the steps of DDIM"),
        ("eval.steps", (50, 2000), "training ddpm: config.eval.steps = 2000: must be whole numbers in 1..1000"),
        ("ldm.sample.guidance", 2.0, "must be 0"),
        ("ldm.autoencoder.path", "runs/vae", "must be empty"),
        ("ddpm.batch_size", 0, "training ddpm: config.batch_size = 0: must be at least 1"),
        ("techniques.cosine.diffusion.schedule", "cosin", "training cosine: .*did you mean 'cosine'"),
        ("techniques.cosine.diffusion.schedul", "cosine", "config.techniques.cosine: .*schedul"),
        ("techniques.more", {}, "must be with one for the technique more"),
    ],
)
def test_a_mistake_is_one_line(field, value, words):
    config = preset.get_config()
    *groups, name = field.split(".")
    group = config
    for part in groups:
        group = group[part]
    group[name] = value
    with pytest.raises(ConfigError) as error:
        validate(config, 1)
    assert "\n" not in str(error.value)
    for part in words.split(".*"):
        assert part in str(error.value)


def test_the_budget_may_change_until_steps_are_decided(tmp_path):
    config = preset.get_config()
    files.save(config, tmp_path / "config.json")
    check_workdir(config, tmp_path)
    config.minutes = 5.0
    check_workdir(config, tmp_path)
    files.write_json(tmp_path / "ladder.json", {"rungs": {"autoencoder": {"steps": 3}}})
    with pytest.raises(ConfigError, match=r"config.minutes = 5.0: .* was made with 30.0;"):
        check_workdir(config, tmp_path)
    config.minutes, config.eval.num = 30.0, 10
    with pytest.raises(ConfigError, match=r"config.eval.num = 10: .* was made with 300;"):
        check_workdir(config, tmp_path)


def lines_of(text, title):
    """The lines of a table of RESULTS.md, as lists of cells."""
    section = text.split(f"## {title}")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]


def test_tables_have_scores_floors_protocol_and_times(tmp_path):
    config = preset.get_config()
    records = [
        record(config, "ddpm"),
        record(config, "ddpm", sampler="ddim", steps=50, seconds=4.0, scores={"fd_effnet_lite0": 40.0}),
        record(config, "ddpm", sampler="ddim", steps=100, step=7),  # of another checkpoint
        record(config, "ddpm", sampler="ddim", steps=200, num=100),  # fewer than the ladder scores
    ]
    lay(tmp_path, config, records)
    text = results(tmp_path)
    assert text == results(tmp_path)
    for words in (
        "1 x cpu",
        "jax 0.10.2",
        "`python -m jaxdiff.main --mode=ladder`",
        "Budget: 30 minutes",
        "2026-01-02",
    ):
        assert words in text
    assert "1,500 training images in 10 classes" in text and "on training, sampling and scoring: 1.5" in text
    trained = {line[0]: line for line in lines_of(text, "Trainings")}
    assert trained["ddpm"] == ["ddpm", "40", "1,500", "budget", "0.25", "1.5", "1.0", "0.5", "val_loss 0.0625"]
    assert trained["ldm"][1] == "not yet"
    head, _, ddpm, d50, d100, d200, floor = lines_of(text, "2. DDIM")
    assert head[1:] == [
        *("trained steps", "fd_effnet_lite0", "kid_effnet_lite0", "knn_accuracy"),
        *("sampling, s", "images/s", "compiling, s", "speed-up"),
    ]
    assert ddpm == ["DDPM, 100 steps", "40", "31.5", "0.25 [0.125, 0.5]", "0.875", "10", "30", "2.5", "1.00"]
    assert d50 == ["DDIM, 50 steps", "40", "40", "0.25 [0.125, 0.5]", "0.875", "4", "75", "2.5", "2.50"]
    assert d100[1] == d200[1] == "not yet"
    assert floor[:5] == ["real images: floor", "", "18.25", "", "0.9688"]
    told = text.split("## 2. DDIM")[1].split("|")[0]
    for words in ("N = 300", "297 val images", "ab" * 6, "300 train images", "effnet_lite0 (package 0.1)", "bilinear"):
        assert words in told
    assert text.split("## 3. Latent diffusion")[1].split("##")[0].strip().endswith("Not yet.")


def test_records_of_other_references_are_told_apart(tmp_path):
    config = preset.get_config()
    records = [record(config, "ddpm"), record(config, "ddpm", sampler="ddim", steps=50)]
    records[1]["protocol"]["reference"]["num"] = 20
    lay(tmp_path, config, records)
    text = results(tmp_path).split("## 2. DDIM")[1].split("\n## ")[0]
    assert "- DDPM, 100 steps: N = 300" in text and "- DDIM, 50 steps: N = 300" in text
    assert "floor (DDPM, 100 steps)" in text and "floor (DDIM, 50 steps)" in text


def test_a_minimum_above_the_share_is_said(tmp_path):
    config = preset.get_config()
    lay(tmp_path, config, [])
    content = read_ladder(tmp_path)
    content["rungs"]["ddpm"]["limit"] = "minimum"
    files.write_json(tmp_path / "ladder.json", content)
    assert "The share of ddpm was too small for the least number of steps, 100." in results(tmp_path)


@pytest.fixture
def short(tiny, monkeypatch):
    """A ladder of which only the pixels' training is climbed, of two steps."""
    config, own = preset.get_config(), tiny("ddpm")
    own.model.update(channel_mult=(1,), attention_resolutions=(), mid_attention=False, context_tokens=0)
    own.steps = 2
    for field in ("batch_size", "steps", "epochs", "warmup_steps", "log_every", "sample_every", "checkpoint_every"):
        config.ddpm[field] = own[field]
    config.ddpm.model, config.ddpm.data.image_size = own.model, own.data.image_size
    config.ddpm.sample.update(num=16, batch_size=16, steps=2)
    config.eval.update(scores=("knn_accuracy",), num=16, steps=(2,))
    config.ldm.autoencoder.train.batch_size = config.ldm.batch_size = 64
    validate(config, jax.device_count())
    monkeypatch.setattr(climb, "rung_names", lambda config: ["ddpm"])
    return config


def test_a_ladder_that_is_stopped_goes_on_and_computes_nothing_twice(short, tmp_path, monkeypatch):
    config, workdir = short, tmp_path / "ladder"
    run_train, run_evaluate = climb.run_train, climb.run_evaluate
    before, done = signal.getsignal(signal.SIGTERM), []

    def climb_until(stop):
        def stopping(name, function):
            def wrapped(*args, **kwargs):
                if name == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                done.append(name)
                return function(*args, **kwargs)

            monkeypatch.setattr(climb, f"run_{name}", wrapped)

        stopping("train", run_train)
        stopping("evaluate", run_evaluate)
        if not stop:
            return climb.run_ladder(config, workdir)
        with pytest.raises(Interrupted) as stopped:
            climb.run_ladder(config, workdir)
        assert not isinstance(stopped.value, Exception) and stopped.value.signum == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before

    climb_until("train")
    (decided,) = read_ladder(workdir)["rungs"].values()
    assert (decided["steps"], decided["limit"], decided["images"]) == (2, "recipe", 1500) and not done
    assert 0 < decided["step_seconds"] < decided["compile_seconds"] and decided["train_seconds"] < 1
    monkeypatch.setattr(climb, "measure_pace", None)  # it is not measured again
    climb_until("evaluate")
    assert done == ["train"]
    text = (workdir / "RESULTS.md").read_text()
    assert [line[1] for line in lines_of(text, "2. DDIM")[2:4]] == ["2", "not yet"]  # a training scores itself
    climb_until(None)
    assert done == ["train", "evaluate", "evaluate"]
    after = read_ladder(workdir)["rungs"]["ddpm"]
    assert {name for name in after if after[name] != decided[name]} == {"train_seconds", "score_seconds"}
    text = (workdir / "RESULTS.md").read_text()
    assert text == results(workdir)
    _, _, ddpm, ddim, floor = lines_of(text, "2. DDIM")
    assert floor[0].startswith("real images") and float(floor[2]) > 0.9
    assert [ddpm[0], ddpm[1], ddim[0]] == ["DDPM, 2 steps", "2", "DDIM, 2 steps"]
    assert float(ddim[-1]) > 0 and 0 <= float(ddim[2]) <= 1

    kept = {path: path.read_bytes() for path in workdir.rglob("*.*") if path.suffix in (".png", ".npz")}
    scores = (workdir / "ddpm" / "scores.json").read_bytes()
    climb_until(None)
    assert "train" not in done[3:] and (workdir / "ddpm" / "scores.json").read_bytes() == scores
    assert {path: path.read_bytes() for path in workdir.rglob("*.*") if path.suffix in (".png", ".npz")} == kept
