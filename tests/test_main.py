"""The command line as a user meets it: train, stop, go on, sample; and what it says to mistakes."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
TINY = """
from tests.tiny import tiny_config

def get_config(experiment):
    config = tiny_config(experiment)
    if experiment == "ldm":
        config.model.update(channel_mult=(1,), attention_resolutions=())
        config.update(steps=300, log_every=1, checkpoint_every=150)
        config.eval.update(every=100, every_num=10)
    return config
"""


def environment():
    """A process like a user's: one device, no TensorFlow (importing it fails), the cache of the tests."""
    return {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'without_tensorflow'}",
    }


def jaxdiff(*arguments, cwd, **kwargs):
    command = [sys.executable, "-m", "jaxdiff.main", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, **kwargs)


def fails(*arguments, cwd):
    """The one line on stderr of a command that must fail with status 2 and leave `cwd` as it is."""
    before = sorted(cwd.rglob("*"))
    result = jaxdiff(*arguments, cwd=cwd)
    assert result.returncode == 2, result.stdout + result.stderr
    assert sorted(cwd.rglob("*")) == before
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.lrr=1"], ["no field 'lrr'", '"lr"']),
        (["--config.lr=fast"], ["lr", "fast"]),
        ([f"--config={ROOT}/configs/ldm_cfg.py:cifar"], [":cifar", "cifar10"]),
        (["--config=configs/none.py"], ["none.py"]),
        (["--mode=sampel"], ["mode", "sample"]),
        (["lr=1"], ["lr=1", "--"]),
        (["--config.model.name=dit_s2", "--config.model.channels=8"], ["config.model.channels = 8", "'dit_s2'"]),
        (["--config.batch_size=0"], ["config.batch_size = 0", "at least 1"]),
        (["--config.warmup_steps=1200"], ["config.warmup_steps = 1200", "less than the 1200 steps"]),
        ([f"--config={ROOT}/configs/ddpm.py:imagenet100"], ["data/imagenet100/train", "--config.data.path", "Kaggle"]),
        (["--mode=sample", "--workdir=none"], ["none", "no config.json"]),
        (["--mode=sample", "--step=3"], ["runs/ldm-digits"]),
        (["--mode=ladder"], ["--mode=ladder", "ldm-digits", "needs --config=configs/ladder.py"]),
        ([f"--config={ROOT}/configs/ladder.py"], ["--mode=train", "ladder-digits", "is for --mode=ladder"]),
        (
            ["--mode=ladder", f"--config={ROOT}/configs/ladder.py", "--config.ldm.lr=0.0"],
            ["training ldm", "config.lr = 0.0", "positive"],
        ),
        (["--step=3"], ["--step=3", "--mode=sample"]),
        (["--mode=evaluate", "--workdir=none"], ["none", "no config.json"]),
        (["--config.eval.scores=('fid',)"], ["config.eval.scores = 'fid'", "fd"]),
        (["--mode=import"], ["--from", "must be given with --mode=import"]),
        (["--to=x"], ["--to=x", "only there"]),
        (
            [f"--config={ROOT}/configs/ddpm.py:imagenet"],
            ["error: --config=...:imagenet", "must be one of digits"],
        ),
        ([f"--workdir={ROOT}/pyproject.toml/run"], ["pyproject.toml/run: Not a directory"]),
        (["--mode=report", "--config.lr=1.0"], ["--config.lr", "left out with --mode=report"]),
        (["--mode=prepare", "--workdir=run"], ["--workdir=run", "--mode=prepare", "--config.data.prepared"]),
        (["--format=diffusers"], ["--format=diffusers", "export only"]),
        (["--mode=import", "--from=none", f"--config={ROOT}/configs/vae.py"], ["none", "config.json"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(tmp_path, arguments, words):
    line = fails(*arguments, cwd=tmp_path)
    for word in words:
        assert word in line


def test_prepare_then_prepare_again_then_spoil(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 2)):
        for name in ("goose", "robin"):
            (tmp_path / "birds" / split / name).mkdir(parents=True)
            for k in range(count):
                image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
                image.save(tmp_path / "birds" / split / name / f"{k}.jpg")
    command = [f"--config={ROOT}/configs/ldm_cfg.py:folder", "--mode=prepare", "--config.data.path=birds"]
    for _ in range(2):
        done = jaxdiff(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "birds-128px: 18 train, 4 val images of 128 pixels in 2 classes\n"
    (tmp_path / "birds" / "train" / "goose" / "page.jpg").write_text("<html>404</html>")
    failed = jaxdiff(*command, "--config.data.prepared=again", cwd=tmp_path)
    assert failed.returncode == 2
    line = failed.stderr.splitlines()[-1]
    assert line.startswith("error: data.max_rejected = 0.001: 1 of 23 images (4.35%)") and "page.jpg" in line
    assert "page.jpg" in (tmp_path / "again" / "rejected.jsonl").read_text()
    assert not (tmp_path / "again" / "manifest.json").exists()


def test_train_stop_go_on_sample(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    train = ["--config=tiny.py:ldm", "--workdir=run"]
    command = [sys.executable, "-m", "jaxdiff.main", *train]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("diffusion  20/300"):
            process.send_signal(signal.SIGTERM)
    error = process.stderr.read()
    assert process.wait() == 128 + signal.SIGTERM, error
    last = error.splitlines()[-1]
    stopped = re.fullmatch(r"stopped and saved at step (\d+) of 300; the same command goes on from there", last)
    assert stopped, error
    step = stopped[1]
    assert 20 <= int(step) < 300
    assert re.search(r"diffusion  20/300  .*loss \S+ .*lr \S+ .* img/s  \S+ ms/step  ETA \S+", "".join(said))

    # Between the two: the checkpoint can be sampled from, and another config is refused.
    assert "config.lr = 0.1" in fails(*train, "--config.lr=0.1", cwd=tmp_path)
    settings = ["--config.sample.classes=7,three", "--config.sample.format=png"]
    assert "sample.classes = 'three'" in fails("--mode=sample", "--workdir=run", *settings, cwd=tmp_path)
    assert "has steps " + step in fails("--mode=sample", "--workdir=run", "--step=1", cwd=tmp_path)
    assert "config.lr" in fails("--mode=sample", "--workdir=run", "--config.lr=0.1", cwd=tmp_path)
    other = f"--config={ROOT}/configs/ddpm.py"
    assert "ldm-digits, not ddpm-digits" in fails("--mode=sample", "--workdir=run", other, cwd=tmp_path)

    done = jaxdiff(*train, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"going on from step {step} of 300" in done.stdout and "autoencoder:" not in done.stdout
    run = tmp_path / "run"
    for line in ("sample grid: run/samples/final.png", "checkpoints: run/checkpoints", "--mode=sample --workdir=run"):
        assert line in done.stdout
    assert done.stdout.endswith("report: run/report.html\n")
    assert "tiny.py: is there and no report" in fails("--mode=report", "--workdir=run", "--to=tiny.py", cwd=tmp_path)
    scores = json.loads((run / "scores.json").read_text())
    assert {"val_loss", "val_images"} == set(scores["validation"]) and scores["validation"]["val_images"] == 297
    (record,) = scores["records"]
    assert {"knn_accuracy", "knn_accuracy_real"} == set(record["scores"])
    assert record["protocol"]["step"] == 300 and record["protocol"]["num"] == 16
    with np.load(run / "samples" / "denoising.npz") as data, np.load(run / "samples" / "real.npz") as real:
        assert data["x_t"].shape == data["x0"].shape == (3, 8, 16, 16, 3) and data["t"].tolist() == [666, 333, 0]
        assert real["arr_1"].tolist() == sorted(list(range(10)) * 8) and real["class_names"].tolist() == list(
            "0123456789"
        )
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == list(range(1, 301))
    assert [(m["step"], m["eval_num"]) for m in metrics if "eval_knn_accuracy" in m] == [(100, 10), (200, 10)]
    assert {"loss", "lr", "grad_norm", "images_per_second", "step_time", "mfu"} <= set(metrics[0])
    assert all(0 < m["mfu"] < 1 for m in metrics if "loss" in m)
    assert re.search(r"\ndiffusion: \S+ MFLOP an image, peak \S+ GFLOP/s a device \(float32 matrix", done.stdout)
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [line.get("stage") for line in starts] == [None, "diffusion"] * 2
    assert starts[2]["command"] == "python -m jaxdiff.main --config=tiny.py:ldm --workdir=run"
    assert (starts[2]["device"], starts[2]["processes"]) == ("1 x cpu", 1)
    assert starts[3]["compile_seconds"] > 0 and starts[3]["time"] >= starts[0]["time"]
    starts = [json.loads(line) for line in (run / "autoencoder" / "starts.jsonl").read_text().splitlines()]
    assert [line.get("stage") for line in starts] == [None, "autoencoder"]
    assert json.loads((run / "config.json").read_text())["lr"] == 0.003
    assert list((run / "tensorboard" / "diffusion").glob("events.*"))
    assert list((run / "samples").glob("diffusion-0000300-raw-ema.png"))

    settings = ["--config.sample.classes=7,2", "--config.sample.num=4", "--config.sample.guidance=2.0"]
    more = ["--config.sample.sampler=ddpm", "--config.sample.steps=4", "--config.sample.weights=raw"]
    drawn = jaxdiff("--mode=sample", "--workdir=run", *settings, *more, cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    grid = tmp_path / drawn.stdout.strip().removeprefix("sample grid: ")
    assert Image.open(grid).size == (34, 34)
    with np.load(grid.with_suffix(".npz")) as data:
        assert data["arr_0"].shape == (4, 16, 16, 3) and data["arr_1"].tolist() == [7, 2, 7, 2]
    # The same samples from their file, scored: no checkpoint is needed for it.
    images = f"--config.eval.images={grid.with_suffix('.npz')}"
    scored = jaxdiff("--mode=evaluate", "--workdir=run", images, cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert re.match(r"knn_accuracy \S+  knn_accuracy_real \S+\n  of 4 ", scored.stdout)
    assert len(json.loads((run / "scores.json").read_text())["records"]) == 2
    assert "config.eval.images = 'none'" in fails(
        "--mode=evaluate", "--workdir=run", "--config.eval.images=none", cwd=tmp_path
    )
    assert "only sample.*, eval.*" in fails("--mode=evaluate", "--workdir=run", "--config.lr=1.", cwd=tmp_path)
    # A sweep, with the older checkpoint as the weak model.
    settings[-1] = "--config.sample.guidance=(0.,1.5)"
    weak = ["--config.sample.autoguidance=run", "--config.sample.autoguidance_step=150"]
    swept = jaxdiff("--mode=sample", "--workdir=run", *settings, *weak, cwd=tmp_path)
    assert swept.returncode == 0, swept.stderr
    names = [f"step300-ema-ddim3-w{w}-auto150-seed0" for w in ("0", "1.5")]
    assert swept.stdout.splitlines() == [f"sample grid: run/samples/{name}.png" for name in names]
    for name, w in zip(names, (0.0, 1.5), strict=True):
        assert json.loads((run / "samples" / f"{name}.json").read_text())["guidance"] == w
        assert (run / "samples" / f"{name}.npz").exists()


def test_autoencoder_alone_then_given_to_another_run(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    first = jaxdiff("--config=tiny.py:vae", "--workdir=vae", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "autoencoder: " in first.stdout and "sample grid" not in first.stdout
    assert "nothing to sample" in fails("--mode=sample", "--workdir=vae", cwd=tmp_path)

    ldm = ["--config=tiny.py:ldm", "--workdir=ldm"]
    wrong = [*ldm, "--config.autoencoder.path=vae", "--config.autoencoder.channels=16"]
    assert "autoencoder.channels = 16" in fails(*wrong, cwd=tmp_path)
    assert "autoencoder.path" in fails(*ldm, "--config.autoencoder.path=elsewhere", cwd=tmp_path)
    second = jaxdiff(*ldm, "--config.autoencoder.path={workdir}/../vae", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "autoencoder  " not in second.stdout and not (tmp_path / "ldm" / "autoencoder").exists()
    # Its place as seen from the workdir is in the checkpoint, so that sampling finds it where both were moved to.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("ldm", "vae"):
        (tmp_path / name).rename(elsewhere / name)
    drawn = jaxdiff("--mode=sample", "--workdir=elsewhere/ldm", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
