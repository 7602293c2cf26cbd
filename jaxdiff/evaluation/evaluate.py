"""Drawing and scoring: at the end of a run, while it trains, and --mode=evaluate."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from jaxdiff import images
from jaxdiff import mesh as meshes
from jaxdiff.build import compute_dtype
from jaxdiff.clock import Stopwatch
from jaxdiff.config.fields import guidance_weights
from jaxdiff.data import load_source
from jaxdiff.data.sources import array_source
from jaxdiff.evaluation.imagefiles import read_images
from jaxdiff.evaluation.judge import Judge
from jaxdiff.evaluation.likelihood import likelihood_record
from jaxdiff.evaluation.neighbours import neighbours_sheet
from jaxdiff.evaluation.records import Record, add_record, describe, is_of, read_scores
from jaxdiff.generator import Generator
from jaxdiff.mesh import say
from jaxdiff.samples import columns, label_names, sample_labels
from jaxdiff.sampling import load_generator
from jaxdiff.training.snapshots import averaged_from

SHOWN = 100  # images of a scored set in its picture
# The fields `sample` that samples depend on, besides num and classes.
DECISIVE = (
    *("sampler", "steps", "spacing", "eta", "guidance", "guidance_interval", "guidance_rescale"),
    *("autoguidance", "autoguidance_step", "clip", "decode_tile", "weights", "seed"),
)


def with_fields(settings: ConfigDict, **fields: Any) -> ConfigDict:
    """A copy of the config fields `sample` with some of another value."""
    return ConfigDict({**settings.to_dict(), **fields})


def labels_in_words(config: ConfigDict, settings: ConfigDict, num_classes: int) -> str:
    """Which labels the samples have that `settings` asks for."""
    if not config.model.conditional:
        return "none"
    some = f"{settings.num} of {num_classes}, evenly spaced"
    every = some if settings.num < num_classes else f"all {num_classes} in turn"
    return f"{settings.classes} in turn" if settings.classes else every


def sample_protocol(config: ConfigDict, settings: ConfigDict, step: int, num_classes: int) -> dict[str, Any]:
    """All that the samples of a checkpoint are a function of, as `settings`, the fields `sample`, say."""
    decisive = (*DECISIVE, *(("sigmas", "churn") if config.diffusion.schedule == "edm" else ()))
    # Through JSON, so that it is equal to what is read from a file.
    values = json.loads(json.dumps({name: settings[name] for name in decisive}))
    return {
        "images": "samples",
        "step": step,
        "ema_decay": config.ema_decay,
        "labels": labels_in_words(config, settings, num_classes),
        **values,
        "dtype": jnp.dtype(compute_dtype(config)).name,
    }


class Scorer:
    """Draws from a generator and scores what it drew, with a record and a picture in the workdir.

    Args: names, of the classes.
    """

    def __init__(
        self, config: ConfigDict, workdir: pathlib.Path, generator: Generator, judge: Judge, names: Sequence[str]
    ) -> None:
        self._config, self._workdir, self._generator, self._judge = config, workdir, generator, judge
        self._names = names

    def __call__(
        self, params: Any, settings: ConfigDict, step: int, drawn: tuple[np.ndarray, Stopwatch] | None = None
    ) -> Record:
        """Score the samples that `settings` describe at the parameters of a step; `drawn`, if they are there yet."""
        labels = self.labels(settings)
        samples, watch = drawn or self.draw(params, settings)
        known = labels if self._config.model.conditional else None
        protocol = self._described(settings, step)
        record = self._judge(samples, known, protocol, watch)
        weights = settings.weights.replace(":", "-")
        stem = f"eval-step{step}-{weights}-{settings.sampler}{settings.steps}-w{settings.guidance:g}"
        keep_record(record, self._workdir, f"{stem}-n{len(samples)}-seed{settings.seed}", samples, known, self._judge)
        return record

    def known(self, settings: ConfigDict, step: int) -> Record | None:
        """The record in the workdir of what a call would score in the same way; None where there is none."""
        protocol = self._judge.protocol(settings.num, self._described(settings, step))
        return next((r for r in read_scores(self._workdir)["records"] if is_of(r, protocol)), None)

    def _described(self, settings: ConfigDict, step: int) -> dict[str, Any]:
        sources = averaged_from(self._config, self._workdir, settings, step)
        return sample_protocol(self._config, settings, step, len(self._names)) | sources

    def labels(self, settings: ConfigDict) -> Int[np.ndarray, " num"]:
        """Labels of images 0..num-1; errors as in `sample_labels`."""
        return sample_labels(settings, label_names(self._config, self._names))

    def draw(self, params: Any, settings: ConfigDict) -> tuple[UInt8[np.ndarray, "n h w 3"], Stopwatch]:
        """The samples, and what they took."""
        watch = Stopwatch()
        with watch.part("sampling"):
            samples = self._generator(params, settings, self.labels(settings))
        return samples, watch

    def scalars(self, params: Any, settings: ConfigDict) -> dict[str, float]:
        """Scores for the log of a training, with the number of samples among them; nothing is written."""
        samples, watch = self.draw(params, settings)
        labels = self.labels(settings) if self._config.model.conditional else None
        scores = self._judge(samples, labels, {}, watch)["scores"]
        return {**{f"eval_{name}": value for name, value in scores.items()}, "eval_num": float(len(samples))}


def keep_record(
    record: Record,
    workdir: pathlib.Path,
    stem: str,
    scored: UInt8[np.ndarray, "n h w 3"],
    labels: Int[np.ndarray, " n"] | None,
    judge: Judge,
) -> None:
    """Put a record into the scores.json of a workdir, a grid of its images beside it, and say what it says."""
    sheet = neighbours_sheet(judge, scored)
    if meshes.is_main():
        before = [r for r in read_scores(workdir)["records"] if is_of(r, record["protocol"])]
        pictures = before[0]["pictures"] if before else {}
        shown = scored[:SHOWN]
        width = columns(np.zeros(len(shown)) if labels is None else labels[: len(shown)])
        sheets = {"samples": images.grid(shown, width)} | ({} if sheet is None else {"neighbours": sheet})
        for name, picture in sheets.items():
            suffix = "" if name == "samples" else f"-{name}"
            path = workdir / pictures.get(name, "")
            if name not in pictures:
                path = images.fresh_path(workdir / "samples" / f"{stem}{suffix}.png")
            record["pictures"][name] = str(images.save_png(path, picture).relative_to(workdir))
        add_record(workdir, record)
    say(describe(record))


def run_evaluate(config: ConfigDict, workdir: pathlib.Path, step: int | None, *, again: bool = True) -> list[Record]:
    """--mode=evaluate: score samples of the newest (or given) checkpoint, at all weights and numbers of steps that are
    asked for, or with `config.eval.images` the images there. Not `again`: samples whose record is there are passed
    over."""
    mesh, e = meshes.make_mesh(), config.eval
    read_scores(workdir)  # where that is damaged it is said before all the work
    judged = read_images(pathlib.Path(e.images), "config.eval.images") if e.images else None
    train, val = load_source(config.data, "train"), load_source(config.data, "val")
    judge = Judge(e, train, val, mesh)
    if judged is not None:
        scored, labels = judged
        sha = array_source(scored, np.zeros(len(scored), np.int32) if labels is None else labels, ()).checksum
        record = judge(scored, labels, {"images": e.images, "sha256": sha}, Stopwatch())
        stem = f"eval-{pathlib.Path(e.images).stem}-n{len(scored)}"
        keep_record(record, workdir, stem, scored, labels, judge)
        return [record]
    if e.scores or e.neighbours:
        judge.check(e.num or config.sample.num)
    generator, params, meta = load_generator(config, workdir, mesh, step)
    records = []
    if e.nll:
        protocol = {name: config.sample[name] for name in ("weights", "seed")}
        protocol |= {"step": meta["step"], "ema_decay": config.ema_decay}
        records.append(likelihood_record(generator, params, config.sample, val, e.nll_num, protocol))
        if meshes.is_main():
            add_record(workdir, records[0])
        say(describe(records[0]))
    if not (e.scores or e.neighbours):
        return records
    scorer = Scorer(config, workdir, generator, judge, meta["class_names"])
    config.sample.autoguidance_step = meta.get("weak_step", 0)  # the newest may be another one tomorrow
    for steps in tuple(e.steps) or (config.sample.steps,):
        for w in guidance_weights(config.sample):
            settings = with_fields(config.sample, steps=steps, guidance=w, num=e.num or config.sample.num)
            known = None if again else scorer.known(settings, meta["step"])
            records.append(known or scorer(params, settings, meta["step"]))
    return records
