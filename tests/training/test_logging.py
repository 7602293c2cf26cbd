"""jaxdiff.training.logging and clu_tensorboard: what a run leaves on disk and on the screen, and what not."""

import inspect
import io
import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxdiff.training import clu_tensorboard
from jaxdiff.training.logging import RunLogger, StepTimer, format_duration

from clu import metric_writers  # isort: skip


def events(folder: pathlib.Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def make(workdir: pathlib.Path, **kwargs: Any) -> RunLogger:
    return RunLogger(workdir, **{"total_steps": 3000, "images_per_step": 8, **kwargs})


# --- RunLogger


def test_scalars_reach_tensorboard_and_jsonl(tmp_path: pathlib.Path) -> None:
    logger = make(tmp_path, stage="vae")
    logger.scalars(1, {"loss": 0.5, "lr": np.float32(1e-3)})
    logger.scalars(2, {"loss": 0.25})
    assert len(records(tmp_path)) == 2, "every line is on disk at once"
    logger.close()
    assert records(tmp_path) == [
        {"step": 1, "stage": "vae", "images": 8, "loss": 0.5, "lr": pytest.approx(1e-3)},
        {"step": 2, "stage": "vae", "images": 16, "loss": 0.25},
    ]
    loss = events(tmp_path / "tensorboard" / "vae").Scalars("loss")
    assert [(e.step, e.value) for e in loss] == [(1, 0.5), (2, 0.25)]


def test_nan_and_infinity_are_valid_json(tmp_path: pathlib.Path) -> None:
    logger = make(tmp_path)
    logger.scalars(1, {"loss": math.nan, "grad_norm": math.inf})
    logger.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert records(tmp_path)[0]["loss"] is None and records(tmp_path)[0]["grad_norm"] is None
    assert math.isnan(events(tmp_path / "tensorboard").Scalars("loss")[0].value)


def test_a_scalar_cannot_be_called_step(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="'step'"):
        make(tmp_path).scalars(1, {"step": 2.0})


def test_images_are_exact(tmp_path: pathlib.Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    logger = make(tmp_path)
    logger.images(3, {"samples": image})
    logger.close()
    (event,) = events(tmp_path / "tensorboard").Images("samples")
    assert (event.step, event.height, event.width) == (3, 5, 7)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), image)


def test_disabled_writes_nothing(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = make(tmp_path / "run", enabled=False)
    logger.resume(3)
    logger.scalars(1, {"loss": 0.5})
    logger.images(1, {"samples": np.zeros((2, 2, 3), np.uint8)})
    logger.progress(1, {"loss": 0.5}, 1.0, 1.0)
    logger.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


# --- resuming


def test_resume_forgets_what_came_after(tmp_path: pathlib.Path) -> None:
    for stage in ("vae", "ldm"):
        logger = make(tmp_path, stage=stage)
        for step in range(1, 6):
            logger.scalars(step, {"loss": float(step)})
        logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("a note of the user\n")
    logger = make(tmp_path, stage="ldm")
    logger.resume(3)
    logger.scalars(4, {"loss": 40.0})
    logger.close()

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines.count("a note of the user") == 1
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [(r["stage"], r["step"]) for r in rows] == [("vae", s) for s in range(1, 6)] + [
        ("ldm", s) for s in range(1, 5)
    ]
    assert rows[-1]["loss"] == 40.0
    assert [p.name for p in tmp_path.glob("metrics*")] == ["metrics.jsonl"], "no temporary file stays"
    curve = {e.step: e.value for e in events(tmp_path / "tensorboard" / "ldm").Scalars("loss")}
    assert curve == {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0}
    assert len(events(tmp_path / "tensorboard" / "vae").Scalars("loss")) == 5


def test_resume_from_zero_forgets_all_of_the_stage(tmp_path: pathlib.Path) -> None:
    for _ in range(2):
        logger = make(tmp_path)
        logger.resume(0)
        logger.scalars(1, {"loss": 1.0})
        logger.close()
    assert len(records(tmp_path)) == 1
    assert len(events(tmp_path / "tensorboard").Scalars("loss")) == 1


@pytest.mark.parametrize(("tail", "survives"), [('{"step": 2, "sta', False), ('{"step": 2, "stage": ""}', True)])
def test_a_torn_last_line(tmp_path: pathlib.Path, tail: str, survives: bool) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": ""}\n' + tail)
    logger = make(tmp_path)
    logger.scalars(3, {"loss": 1.0})
    logger.close()
    assert [r["step"] for r in records(tmp_path)] == ([1, 2, 3] if survives else [1, 3])


def test_a_failed_rewrite_loses_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = make(tmp_path)
    logger.scalars(1, {"loss": 1.0})
    logger.scalars(2, {"loss": 1.0})

    def fail(*paths: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        logger.resume(1)
    assert [r["step"] for r in records(tmp_path)] == [1, 2]


# --- progress


def test_progress_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = make(tmp_path, stage="autoencoder")
    logger.progress(1200, {"loss": 0.05123, "lr": 9.1e-5, "grad_norm": 0.412}, 412.3, 0.1066)
    logger.close()
    assert capsys.readouterr().out == (
        "autoencoder  1,200/3,000  loss 0.0512  lr 9.1e-05  grad 0.412  412 img/s  107 ms/step  ETA 3:12\n"
    )


def test_progress_on_a_terminal_rewrites_one_line_that_fits(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = make(tmp_path)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    logger.progress(1, {"loss": 1.0, "psnr": 20.0, "lr": 1e-4}, 3.25, 0.004)
    logger.progress(2, {"loss": 1.0}, 3.25, 0.004)
    logger.close()
    first, second, rest = capsys.readouterr().out.removeprefix("\r").replace("\n", "\r\n").split("\r")
    assert first == "\033[Ktrain  1/3,000  loss 1  3.2 img/s  4.0 ms/step  ETA 0:12"
    assert second.startswith("\033[Ktrain  2/3,000") and rest == "\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (192.4, "3:12"),
        (3599.6, "1:00:00"),
        (97_392, "27:03:12"),
        (math.nan, "?"),
        (math.inf, "?"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# --- StepTimer


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_timer_measures_windows_without_pauses() -> None:
    clock = Clock()
    timer = StepTimer(32, clock)
    clock.now += 1000  # compilation
    timer.start(10)
    clock.now += 4
    for seconds in (50, 30):
        with timer.pause("checkpoint"):
            clock.now += seconds
    clock.now += 1
    assert timer.lap(20) == (64.0, 0.5, {"checkpoint": 80})
    with pytest.raises(RuntimeError), timer.pause("samples"):
        clock.now += 7
        raise RuntimeError
    clock.now += 2
    assert timer.lap(21) == (16.0, 2.0, {"samples": 7}), (
        "the pause of the window before is forgotten, this one's counts"
    )
    with pytest.raises(ValueError, match="21"):
        timer.lap(21)


# --- the CLU writer


def test_writer_has_the_arguments_of_the_interface() -> None:
    for name in metric_writers.MetricWriter.__abstractmethods__:
        ours = inspect.signature(getattr(clu_tensorboard.SummaryWriter, name)).parameters
        theirs = inspect.signature(getattr(metric_writers.MetricWriter, name)).parameters
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ], name
    assert metric_writers.SummaryWriter is clu_tensorboard.SummaryWriter
    assert issubclass(clu_tensorboard.SummaryWriter, metric_writers.MetricWriter)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_default_writer_of_clu(tmp_path: pathlib.Path, asynchronous: bool) -> None:
    writer = metric_writers.create_default_writer(tmp_path, asynchronous=asynchronous)
    half = np.full((2, 4, 6, 1), 0.5, ml_dtypes.bfloat16)
    writer.write_scalars(1, {"loss": np.ones((1,), ml_dtypes.bfloat16)})
    writer.write_images(2, {"gray": half, "one": np.ones((4, 6, 3))})
    writer.write_texts(3, {"note": "*hello*"})
    writer.write_histograms(4, {"weights": np.arange(10.0)}, num_buckets={"weights": 5})
    writer.write_hparams({"lr": 1e-3, "model": {"channels": 64}})
    writer.write_summaries(5, {"raw": np.arange(3, dtype=np.float32)})
    writer.flush()
    writer.close()
    read = events(tmp_path)
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 1.0)]
    for tag, pixel in (("gray/0", 128), ("gray/1", 128), ("one", 255)):
        (event,) = read.Images(tag)
        assert event.step == 2
        assert (np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) == pixel).all()
    (histogram,) = read.Histograms("weights")
    assert (histogram.step, histogram.histogram_value.bucket) == (4, [2.0] * 5)
    (note,) = read.Tensors("note")
    assert (note.step, note.tensor_proto.string_val[0]) == (3, b"*hello*")
    (table,) = read.Tensors("hparams")
    assert b"| lr | 0.001 |\n| model.channels | 64 |" in table.tensor_proto.string_val[0]
    assert read.summary_metadata["note"].plugin_data.plugin_name == "text"
    (raw,) = read.Tensors("raw")
    np.testing.assert_array_equal(np.frombuffer(raw.tensor_proto.tensor_content, np.float32), [0, 1, 2])


def test_just_logging_writes_no_files(tmp_path: pathlib.Path) -> None:
    writer = metric_writers.create_default_writer(tmp_path, just_logging=True)
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_an_error(tmp_path: pathlib.Path) -> None:
    writer = clu_tensorboard.SummaryWriter(str(tmp_path))
    with pytest.raises(ValueError, match="sound"):
        writer.write_audios(1, {"sound": np.zeros((1, 8, 1))}, sample_rate=8)
    with pytest.raises(ValueError, match="film"):
        writer.write_videos(1, {"film": np.zeros((1, 2, 4, 4, 3))})
    with pytest.raises(ValueError, match=r"'x'.*\(4, 4\)"):
        writer.write_images(1, {"x": np.zeros((4, 4), np.uint8)})
    with pytest.raises(ValueError, match="'x'.*int32"):
        writer.write_images(1, {"x": np.zeros((4, 4, 3), np.int32)})
    with pytest.raises(ValueError, match="'x'.*finite"):
        writer.write_histograms(1, {"x": np.array([1, np.nan])})
    writer.close()


PROGRAM = """
import pathlib, sys
from jaxdiff.training.logging import RunLogger
from clu import metric_writers, periodic_actions
folder = pathlib.Path(sys.argv[1])
logger = RunLogger(folder, total_steps=10, images_per_step=1)
logger.scalars(1, {"loss": 1.0})
logger.close()
writer = metric_writers.create_default_writer(folder / "clu")
report = periodic_actions.ReportProgress(num_train_steps=10, writer=writer, every_steps=1, every_secs=None)
for step in range(1, 4):
    report(step)
writer.close()
assert "tensorflow" not in sys.modules
"""


def test_tensorflow_is_not_imported(tmp_path: pathlib.Path) -> None:
    package = tmp_path / "tensorflow"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('tensorflow was imported')\n")
    root = str(pathlib.Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root]), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert events(tmp_path / "run" / "clu").Scalars("steps_per_sec")
