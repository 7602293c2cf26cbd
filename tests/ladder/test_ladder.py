"""The ladder: steps from a budget, tables from files, mistakes in a line, and a climb that is stopped and goes on."""

import json
import os
import signal

import jax
import pytest

from configs import ladder as preset
from jaxdiff.config import files
from jaxdiff.errors import ConfigError, Interrupted, Stopped
from jaxdiff.ladder import climb
from jaxdiff.ladder.results import results
from jaxdiff.ladder.rungs import check_workdir, read_ladder, rung_config, rung_names, validate
from jaxdiff.training.pace import Length, Pace, choose_steps, with_steps


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
    config.update(epochs=2.0, steps=0, batch_size=10, warmup_steps=30, sample_every=0, checkpoint_every=100)
    with_steps(config, 60, 1500)  # of 300
    assert (config.epochs, config.steps, config.warmup_steps) == (0.0, 60, 6)
    assert (config.sample_every, config.checkpoint_every, config.log_every) == (0, 20, 1)
    config.warmup_steps = 60
    with_steps(config, 1, 1500)
    assert (config.steps, config.warmup_steps, config.checkpoint_every) == (1, 0, 1)


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "imagenet100", "tfds:imagenette/320px-v2"])
def test_presets_are_possible_and_shares_leave_time_to_sample(dataset):
    config = preset.get_config(dataset)
    validate(config, 1)
    assert set(config.shares) == set(rung_names(config)) and sum(config.shares.values()) < 0.9


def test_a_technique_changes_its_fields_and_shares_the_autoencoder(tmp_path):
    config = preset.get_config()
    base, cosine = (files.flatten(rung_config(config, name, tmp_path)) for name in ("ldm", "cosine"))
    differ = {field for field in base if base[field] != cosine[field]}
    assert differ == {"name", "diffusion.schedule"} and base.keys() == cosine.keys()
    assert base["autoencoder.path"] == str(tmp_path / "autoencoder")
    config.shares.cosine = 0.0
    assert rung_names(config) == ["autoencoder", "ddpm", "ldm"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("minutes", 0.0, "config.minutes = 0.0: must be positive"),
        ("shares.ddpm", 0.9, "must be at most 1 in all, and is 1.28"),
        ("shares.ddpm", 0.0, "config.shares.ddpm = 0.0: must be positive"),
        ("shares.dppm", 0.1, "config.shares.dppm = 0.1: must be of one of autoencoder, ddpm, ldm, cosine"),
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


def record(config, rung, num=300, seconds=10.0, scores=None, step=40, **changed):
    """As --mode=evaluate leaves it."""
    s = {**rung_config(config, rung, ".").sample.to_dict(), **changed}
    fields = ("sampler", "steps", "spacing", "eta", "guidance", "guidance_interval", "guidance_rescale")
    fields += ("autoguidance", "autoguidance_step", "clip", "decode_tile", "weights", "seed")
    protocol = {"num": num, "images": "samples", "step": step, "labels": "all 10 in turn", **{f: s[f] for f in fields}}
    protocol |= {"reference": {"name": "val", "num": 297, "sha256": "ab" * 32}, "floor": {"name": "train", "num": num}}
    protocol["extractor"] = {"name": "effnet_lite0", "weights": "package 0.1", "resize": "bilinear"}
    kid = {"kid_effnet_lite0": 0.25, "kid_low_effnet_lite0": 0.125, "kid_high_effnet_lite0": 0.5}
    return {
        "scores": {"fd_effnet_lite0": 31.5, **kid, **(scores or {})},
        "floor": {"fd_effnet_lite0": 18.25},
        "protocol": protocol,
        "seconds": {"compile": 2.5, "sampling": seconds},
        "device": "1 x cpu",
        "pictures": {},
    }


def lay(workdir, config, records):
    """A ladder's workdir with these records of the rung ddpm."""
    decided = dict(steps=40, limit="budget", recipe=1500, share_seconds=90.0, step_seconds=0.25, compile_seconds=9.0)
    decided |= dict(images=1500, image_size=16, classes=10, device="1 x cpu", train_seconds=60.0, score_seconds=30.0)
    files.save(config, workdir / "config.json")
    files.write_json(workdir / "ladder.json", {"rungs": {"ddpm": decided}})
    (workdir / "ddpm").mkdir()
    files.write_json(workdir / "ddpm" / "scores.json", {"validation": {"val_loss": 0.0625}, "records": records})
    start = {"time": "2026-01-02T03:04:05+00:00", "command": "python -m jaxdiff.main --mode=ladder", "python": "3.12.1"}
    start |= {"packages": {"jax": "0.10.2"}, "device": "1 x cpu", "processes": 1}
    (workdir / "starts.jsonl").write_text(json.dumps(start) + "\n")


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
        *("trained steps", "fd_effnet_lite0", "kid_effnet_lite0", "sampling, s", "images/s", "compiling, s", "speed-up")
    ]
    assert ddpm == ["DDPM, 100 steps", "40", "31.5", "0.25 [0.125, 0.5]", "10", "30", "2.5", "1.00"]
    assert d50 == ["DDIM, 50 steps", "40", "40", "0.25 [0.125, 0.5]", "4", "75", "2.5", "2.50"]
    assert d100[1] == d200[1] == "not yet"
    assert floor[:3] == ["real images: floor", "", "18.25"]
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


def tiny_ladder(tiny):
    """A ladder that is climbed in seconds: two trainings in latents, one in pixels, of two steps each."""
    config = preset.get_config()
    for name in ("ddpm", "ldm"):
        own = tiny(name)
        own.model.update(channel_mult=(1,), attention_resolutions=(), mid_attention=False, context_tokens=0)
        own.steps = 2
        for field in ("batch_size", "steps", "epochs", "warmup_steps", "log_every", "sample_every", "checkpoint_every"):
            config[name][field] = own[field]
        config[name].model, config[name].data.image_size = own.model, own.data.image_size
        config[name].sample.update(num=16, batch_size=16, steps=2)
        if name == "ldm":
            config.ldm.autoencoder = own.autoencoder
            config.ldm.autoencoder.train.steps = 2
    config.ddpm.sample.sampler = "ddpm"
    config.eval.update(scores=("knn_accuracy",), num=16, steps=(3,))
    config.guidance, config.least_steps = (1.5,), 1
    return config


def test_a_ladder_that_is_stopped_goes_on_and_computes_nothing_twice(tiny, tmp_path, monkeypatch):
    config, workdir = tiny_ladder(tiny), tmp_path / "ladder"
    validate(config, jax.device_count())
    run_train, before = climb.run_train, signal.getsignal(signal.SIGTERM)
    trained = []

    def stopped_after_one(own, folder):
        if trained:
            os.kill(os.getpid(), signal.SIGTERM)
        trained.append(folder.name)
        return run_train(own, folder)

    monkeypatch.setattr(climb, "run_train", stopped_after_one)
    with pytest.raises(Interrupted) as stop:
        climb.run_ladder(config, workdir)
    assert isinstance(stop.value, Stopped) and stop.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before and trained == ["autoencoder"]
    decided = read_ladder(workdir)["rungs"]
    assert set(decided) == {"autoencoder", "ddpm"} and decided["ddpm"]["steps"] == 2
    assert lines_of(results(workdir), "Trainings")[3][-1] == "not yet"

    def trains(own, folder):
        trained.append(folder.name)
        return run_train(own, folder)

    monkeypatch.setattr(climb, "run_train", trains)
    climb.run_ladder(config, workdir)
    assert trained == ["autoencoder", "ddpm", "ldm", "cosine"]
    after = read_ladder(workdir)["rungs"]
    timed = ("train_seconds", "score_seconds")
    assert {k: v for k, v in after["ddpm"].items() if k not in timed} == {
        k: v for k, v in decided["ddpm"].items() if k not in timed
    }
    assert not (workdir / "cosine" / "autoencoder").exists()
    text = (workdir / "RESULTS.md").read_text()
    assert "ot yet" not in text and text == results(workdir)
    assert [line[0] for line in lines_of(text, "4. Guidance")[2:]] == ["latent diffusion, w = 0", "w = 1.5"]
    assert [line[0] for line in lines_of(text, "5. Techniques")[3:]] == ["cosine: diffusion.schedule = cosine"]

    # Again: all is there.
    kept = {path: path.read_bytes() for path in workdir.rglob("scores.json")}
    pictures = sorted(workdir.rglob("*.png"))
    climb.run_ladder(config, workdir)
    assert trained == ["autoencoder", "ddpm", "ldm", "cosine"] and sorted(workdir.rglob("*.png")) == pictures
    assert {path: path.read_bytes() for path in workdir.rglob("scores.json")} == kept
