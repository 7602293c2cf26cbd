"""A run that is stopped and started again ends as if it had not been stopped, to the last bit."""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxdiff.config import files
from jaxdiff.data import train_batches
from jaxdiff.errors import ConfigError, Interrupted, Stopped
from jaxdiff.evaluation.records import read_scores
from jaxdiff.training import experiments, loop, stages, step
from jaxdiff.training.checkpoint import STATE_ITEMS, Checkpoints
from jaxdiff.training.stages import run_train
from jaxdiff.training.step import formats

STEPS = 20
pytestmark = pytest.mark.usefixtures("optimized")


def config_of(tiny):
    config = tiny("ddpm")
    config.model.update(channel_mult=(1,), attention_resolutions=(), dropout=0.1)
    # Neither the checkpoints, the log nor the epochs of 1,500 images end where the run is stopped.
    config.update(steps=STEPS, log_every=3, checkpoint_every=8, sample_every=0, batch_size=80, accumulate=2)
    config.model.norm_groups = 4  # with a channel a group gradients of biases are but rounding, which Adam makes large
    config.data.flip = True
    config.update(ema_sigma_rel=(0.1,), ema_snapshot_every=3)
    config.sample.weights = "sigma_rel:0.1"
    config.eval.scores = ()
    return config


def leaves(workdir):
    """All arrays of the last checkpoint, by path, and its meta."""
    checkpoints = Checkpoints(workdir)
    step = checkpoints.pick(None)
    folder = workdir / "checkpoints" / str(step)
    items = [item for item in STATE_ITEMS if (folder / item).exists()]
    trees = {item: ocp.StandardCheckpointer().restore(folder / item) for item in items}
    flat = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(trees)}
    return step, flat, checkpoints.meta(step)


def records(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timing = ("images_per_second", "step_time", "mfu")
    return [{k: v for k, v in line.items() if k not in timing and not k.endswith("_seconds")} for line in lines]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory, optimized):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    run_train(config_of(tiny), workdir)
    return workdir


def assert_same(workdir, whole):
    (step, mine, meta), (last, reference, meta_reference) = leaves(workdir), leaves(whole)
    assert step == last == STEPS and meta == meta_reference
    assert mine.keys() == reference.keys() and len(mine) > 50
    for name, value in reference.items():
        assert value.tobytes() == mine[name].tobytes(), name
    assert records(workdir) == records(whole)
    snapshots, reference = ({p.name: p.read_bytes() for p in (w / "snapshots").iterdir()} for w in (workdir, whole))
    assert snapshots == reference and sorted(snapshots) == [f"{step:07d}.npz" for step in range(3, STEPS + 1, 3)]
    assert (workdir / "samples" / "final.png").read_bytes() == (whole / "samples" / "final.png").read_bytes()
    assert json.loads((workdir / "scores.json").read_text()) == json.loads((whole / "scores.json").read_text())


def test_ten_and_ten_are_twenty(tiny, tmp_path, whole):
    workdir = tmp_path / "run"
    with pytest.raises(Stopped, match="stopped and saved at step 10 of 20"):
        run_train(config_of(tiny), workdir, stop_at=10)
    assert Checkpoints(workdir).latest == 10
    run_train(config_of(tiny), workdir)
    stop_line = [r for r in records(workdir) if r["step"] == 10]
    assert not stop_line  # it is logged only where it would have been anyway
    assert_same(workdir, whole)


def test_killed_after_a_checkpoint(tiny, tmp_path, whole, monkeypatch):
    """Nothing saved at the end: what came after the last checkpoint is computed, and logged, again."""
    workdir = tmp_path / "run"

    class Killed(Exception):
        pass

    def die(self, step, signum):
        if step == 13:
            raise Killed
        return False

    monkeypatch.setattr(Checkpoints, "should_stop", die)
    with pytest.raises(Killed):
        run_train(config_of(tiny), workdir)
    monkeypatch.undo()
    assert {r["step"] for r in records(workdir)} >= {9, 12}
    (workdir / "snapshots" / "0000012.npz").write_bytes(b"torn")  # newer than the checkpoint, it is written again
    run_train(config_of(tiny), workdir)
    assert_same(workdir, whole)


def test_an_error_just_after_a_checkpoint_leaves_it(tiny, tmp_path, monkeypatch):
    def fail(self, step, signum):
        if step == 8:
            raise OSError("the folder of images is gone")
        return False

    def slowly(self, *args, **options):
        time.sleep(0.5)
        return manager_save(self, *args, **options)

    manager_save = ocp.CheckpointManager.save
    monkeypatch.setattr(ocp.CheckpointManager, "save", slowly)
    monkeypatch.setattr(Checkpoints, "should_stop", fail)
    with pytest.raises(OSError, match="is gone"):
        run_train(config_of(tiny), tmp_path)
    assert Checkpoints(tmp_path).steps == [8]


@pytest.mark.parametrize(("at", "saved"), [(6, 7), (STEPS, STEPS)])
def test_sigterm_saves_and_stops(tiny, tmp_path, monkeypatch, at, saved):
    workdir = tmp_path / "run"
    lap = loop.StepTimer.lap

    def lap_then_signal(self, step):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return lap(self, step)

    monkeypatch.setattr(loop.StepTimer, "lap", lap_then_signal)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        run_train(config_of(tiny), workdir)
    assert stopped.value.signum == signal.SIGTERM
    assert Checkpoints(workdir).latest == saved and signal.getsignal(signal.SIGTERM) == before


def test_finished_run_trains_no_more_and_overwrites_nothing(tiny, whole):
    before = leaves(whole)[1]
    run_train(config_of(tiny), whole)
    assert (whole / "samples" / "final-2.png").exists()
    assert all((before[name] == value).all() for name, value in leaves(whole)[1].items())


def test_another_config_is_refused_before_anything_is_touched(tiny, whole):
    files = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    config = config_of(tiny)
    config.seed = 5
    with pytest.raises(ConfigError, match=r"config.seed = 5: .* was made with 0;"):
        run_train(config, whole)
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == files


def test_other_images_are_refused_before_anything_is_compiled(tiny, tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        run_train(config_of(tiny), tmp_path / "run", stop_at=1)
    images = stages.load_source(config_of(tiny).data, "val")
    monkeypatch.setattr(stages, "load_source", lambda *_: images)
    monkeypatch.setattr(loop, "Compiling", None)  # whoever calls it fails
    words = r"config.data: these are 297 images in classes 0, 1, 2, 3, 4, ...; the run was begun with 1,500 in 0, 1"
    with pytest.raises(ConfigError, match=words):
        run_train(config_of(tiny), tmp_path / "run")


def test_kernels_that_lie_as_on_a_gpu(tiny, tmp_path, whole, monkeypatch):
    """Restored, trained, validated, saved and sampled from with the kernels' features first in memory."""
    workdir, seen = tmp_path / "run", []
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))

    def features_first(state, mesh):
        seen.append(formats(state, mesh, gpu=True))
        return seen[-1]

    def save(self, number, *, args, **options):
        arrays = jax.tree.leaves([args[name].item for name in set(args.keys()) & set(STATE_ITEMS)])
        assert all(isinstance(x, np.ndarray) and x.flags.c_contiguous for x in arrays)
        return manager_save(self, number, args=args, **options)

    for module in (step, loop):
        monkeypatch.setattr(module, "formats", features_first)
    manager_save = ocp.CheckpointManager.save
    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    run_train(config_of(tiny), workdir)
    layouts = [str(f) for f in jax.tree.leaves(seen[-1].params)]
    assert 5 < sum("3, 0, 1, 2" in text for text in layouts) < len(layouts)
    (_, mine, _), (_, reference, _) = leaves(workdir), leaves(whole)
    for name, value in reference.items():
        np.testing.assert_allclose(mine[name], value, rtol=1e-5, atol=1e-5 * np.abs(value).max(), err_msg=name)


def test_readers_that_die_of_a_signal_end_the_batches_and_of_nothing_else_do_not():
    """A signal to all processes of a job reaches those that read as well."""

    def batches():
        yield 1
        yield 2
        raise RuntimeError("Worker process was terminated unexpectedly")

    stop = loop.StopSignal()
    with pytest.raises(RuntimeError, match="terminated"):
        list(loop.until_stopped(batches(), stop))
    stop.signum = signal.SIGTERM
    assert list(loop.until_stopped(batches(), stop)) == [1, 2]


def test_a_run_whose_readers_die_of_its_signal_is_saved(tiny, tmp_path, monkeypatch):
    def dying(*args, **kwargs):
        for k, batch in enumerate(train_batches(*args, **kwargs)):
            if k == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("Worker process was terminated unexpectedly")
            yield batch

    monkeypatch.setattr(experiments, "train_batches", dying)
    config = config_of(tiny)
    with pytest.raises(Stopped, match="stopped and saved at step [0-3] of 20") as stopped:
        run_train(config, tmp_path / "run")
    assert stopped.value.signum == signal.SIGTERM and Checkpoints(tmp_path / "run").latest in range(4)


def test_validation_is_put_down_when_all_else_is(tiny, tmp_path, monkeypatch):
    """A ladder takes it for the end of a training."""

    def stopped(*args):
        raise Interrupted(signal.SIGTERM)

    config = config_of(tiny)
    config.update(steps=2, checkpoint_every=2)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(stages, "save_real", stopped)
        run_train(config, tmp_path / "run")
    assert not read_scores(tmp_path / "run")["validation"]
    run_train(config, tmp_path / "run")
    assert read_scores(tmp_path / "run")["validation"] and (tmp_path / "run" / "samples" / "real.npz").exists()


def test_two_trainings_do_not_meet_in_a_workdir(tiny, tmp_path):
    config = config_of(tiny)
    workdir = tmp_path / "run"
    other = config.copy_and_resolve_references()
    other.sample.steps = 2
    with files.training_in(config, workdir):
        with pytest.raises(ConfigError, match=r"--workdir=.*run: another process is training there"):
            run_train(other, workdir)
        assert files.load(workdir / "config.json") == config
    assert not (workdir / "checkpoints").exists()
    with files.training_in(other, workdir):  # free again
        assert files.load(workdir / "config.json") == other
    (workdir / "config.json").unlink()  # as of one that was killed before it was written
    with files.training_in(config, workdir):
        pass


def test_scores_that_cannot_be_had_are_an_error_before_all_else(tiny, tmp_path):
    config = config_of(tiny)
    config.eval.update(scores=("is",), splits=400, num=400)
    with pytest.raises(ConfigError, match="at least 400 images for the score 'is'; these are 297"):
        run_train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
