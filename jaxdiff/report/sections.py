"""The sections of the report: each is a function of what was read, and a line in `SECTIONS`."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdiff.config.files import flatten
from jaxdiff.report import galleries, ladders, tables, text
from jaxdiff.report import scores as scoring
from jaxdiff.report.curves import SMOOTHED, Stage, owners, span
from jaxdiff.report.pictures import Album
from jaxdiff.report.reading import Run, number, read_ladders


class Context(NamedTuple):
    """All that sections are made of."""

    runs: Sequence[Run]
    stages: Sequence[Stage]
    album: Album


class Section(NamedTuple):
    """A section of the page: `template` shows `data`."""

    key: str
    title: str
    template: str
    data: dict[str, Any]
    intro: str = ""


EXPERIMENTS = {"ldm": "latent diffusion", "ddpm": "diffusion in pixels", "vae": "autoencoder"}


def ladder(context: Context) -> Section | None:
    """The study, where the runs are all those of a ladder."""
    found = [ladders.describe(own, context.album) for own in read_ladders(context.runs)]
    intro = "From diffusion in pixels to latents, guidance and techniques: each line against the one that it builds on."
    return Section("ladder", "The ladder", "ladder.html", {"ladders": found}, intro) if found else None


def overview(context: Context) -> Section:
    """What the runs are and how far, and their main numbers."""
    styles = owners(context.runs)
    cards = [_card(run, styles[run.owner][0], context.runs) for run in context.runs if run.own]
    return Section("overview", "Overview", "overview.html", {"cards": cards})


def _card(run: Run, colour: str, runs: Sequence[Run]) -> dict[str, Any]:
    config, (done, total) = run.config, run.steps
    data = config.data.get("name") or pathlib.Path(config.data.get("path") or config.data.source).name
    size = config.data.image_size
    if not total:
        state = f"step {done:,}"
    else:
        state = f"all {total:,} steps" if done >= total else f"step {done:,} of {total:,}"
    facts = [best_fact(run), *(validation_fact(run, name) for name in ("val_loss", "val_psnr", "val_ssim"))]
    for autoencoder in (r for r in runs if r.owner == run.name and not r.own):
        if fact := validation_fact(autoencoder, "val_psnr"):
            facts.append(("Autoencoder PSNR", *fact[1:]))
    facts += [number_of(run, "loss", "Loss, last"), number_of(run, "images_per_second", "Images/s, median")]
    return {
        "name": run.name,
        "colour": colour,
        "what": f"{EXPERIMENTS.get(config.experiment, config.experiment)} on {data}, {size}×{size}",
        "done": done,
        "total": total,
        "state": state,
        "when": when(run),
        "facts": [fact for fact in facts if fact],
    }


def when(run: Run) -> str:
    """From when to when a run wrote, as far as its files tell."""
    starts = [text.moment(start["time"]) for start in run.starts if "time" in start]
    metrics = run.workdir / "metrics.jsonl"
    last = [text.moment(metrics.stat().st_mtime)] if metrics.exists() else []
    return " to ".join(dict.fromkeys([*starts[:1], *last]))


def number_of(run: Run, name: str, label: str) -> tuple[str, str, str] | None:
    """The last, or median, of a number of training."""
    values = run.numbers(name)
    if not values:
        return None
    return label, text.figures(float(np.median(values)) if "median" in label else values[-1]), ""


def validation_fact(run: Run, name: str) -> tuple[str, str, str] | None:
    """A validation score: that of scores.json, while there is none the newest of metrics.jsonl."""
    value = number(run.validation.get(name))
    if value is None:
        value = next(reversed(run.numbers(name)), None)
    labels = {"val_loss": "Validation loss", "val_psnr": "Validation PSNR", "val_ssim": "Validation SSIM"}
    n = scoring.validation_images(run)
    note = "" if name == "val_loss" and not n else f"{text.figures(n)} validation images" if n else "validation images"
    return None if value is None else (labels[name], text.figures(value) + (" dB" if name == "val_psnr" else ""), note)


def best_fact(run: Run) -> tuple[str, str, str] | None:
    """The best value of the most telling score of a run's records, with its protocol and floor."""
    records = [record for record in run.records if "bound" not in record["protocol"]]  # likelihoods are not of samples
    scored = [(name, r) for r in records for name in scoring.score_names(r["scores"])[:1] if scoring.sign(name)]
    if not scored:
        return None
    names = [name for name, _ in scored]
    name = scoring.score_names(dict.fromkeys(names, 0.0))[0]
    known = scoring.metric(name)
    _, record = min((s for s in scored if s[0] == name), key=lambda s: scoring.sign(name) * s[1]["scores"][name])
    floor = scoring.floor_of(record, name)
    real = "no floor recorded" if floor is None else f"real images: {text.figures(floor)}"
    label, value = known.label if known else name, text.figures(record["scores"][name])
    return f"{label}, best", value, f"{real}; {scoring.terse(record)}"


def curves(context: Context) -> Section | None:
    """The curves of all runs, stages apart."""
    if not context.stages:
        return None
    styles = owners(context.runs)
    legend = [{"name": name, "colour": colour, "dash": dash} for name, (colour, dash) in styles.items()]
    singles = {stage.name: table for stage in context.stages if (table := _single_table(stage))}
    longest = max((len(run.lines) for run in context.runs), default=0)
    intro = f"Faint: as recorded. Bold: an average over up to about {span(longest)} neighbouring values."
    data = {"stages": context.stages, "legend": legend, "singles": singles}
    return Section("curves", "Curves", "curves.html", data, intro if longest >= SMOOTHED else "")


def _single_table(stage: Stage) -> tables.Table | None:
    """What a stage has one value of so far, a run to a row."""
    names = list(dict.fromkeys(name for name, *_ in stage.single))
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for name, run, value, step in stage.single:
        rows.setdefault((run, step), {})[name] = value
    head = [tables.Head(name, numeric=k > 0) for k, name in enumerate(("Run", "Step", *names))]
    body = [[run, text.figures(step), *(text.figures(v.get(n)) for n in names)] for (run, step), v in rows.items()]
    return tables.Table("One value so far", head, [list(map(tables.Cell, row)) for row in body]) if body else None


def training(context: Context) -> Section | None:
    """Grids drawn during training, on a slider."""
    figures = galleries.training(context.runs, context.album)
    intro = "Of the same noise, or the same validation images, at every step. Move the slider, or press its arrow keys."
    return Section("training", "Through training", "training.html", {"figures": figures}, intro) if figures else None


def samples(context: Context) -> Section | None:
    """The samples at the end, and those drawn since."""
    figures = galleries.drawn(context.runs, context.album)
    return Section("samples", "Samples", "figures.html", {"figures": figures}) if figures else None


def guidance(context: Context) -> Section | None:
    """A map of guidance and steps for each run."""
    maps = galleries.maps(context.runs, context.album)
    return Section("guidance", "Guidance × steps", "maps.html", {"maps": maps}) if maps else None


def classes(context: Context) -> Section | None:
    """Samples of a class next to real images of it."""
    browsers = galleries.classes(context.runs, context.album)
    return Section("classes", "Classes", "classes.html", {"browsers": browsers}) if browsers else None


def denoising(context: Context) -> Section | None:
    """From noise to an image."""
    strips = galleries.denoising(context.runs, context.album)
    intro = "Upper rows: the noisy image xₜ. Lower rows: the clean image x₀ that the network predicts from it."
    return Section("denoising", "Denoising", "denoising.html", {"strips": strips}, intro) if strips else None


def neighbours(context: Context) -> Section | None:
    """Samples next to the training images that are most like them."""
    figures = galleries.neighbours(context.runs, context.album)
    intro = "Each sample next to the training images nearest to it: a model that has memorised would show copies."
    return Section("neighbours", "Neighbours", "figures.html", {"figures": figures}, intro) if figures else None


def scores(context: Context) -> Section | None:
    """Scores with their complete protocol."""
    found = [*scoring.record_tables(context.runs), *scoring.validation_tables(context.runs)]
    return _tables("scores", "Scores", found)


def latency(context: Context) -> Section | None:
    """What drawing costs."""
    return _tables("latency", "Speed", [tables.latency_table(context.runs)])


def configs(context: Context) -> Section:
    """How the configs differ, and each in whole."""
    own = [run for run in context.runs if run.own]
    whole = []
    for run in context.runs:
        fields = [
            [tables.Cell(f, code=True), tables.Cell(text.setting(v))] for f, v in sorted(flatten(run.config).items())
        ]
        whole.append(tables.Table(f"Whole config of {run.name}", [tables.Head("Field"), tables.Head("Value")], fields))
    return Section("config", "Configuration", "tables.html", {"tables": tables.config_tables(own), "details": whole})


def starts(context: Context) -> Section | None:
    """Commands and environments."""
    return _tables("starts", "Starts", [tables.start_table(run) for run in context.runs])


def _tables(key: str, title: str, found: Sequence[tables.Table | None], intro: str = "") -> Section | None:
    present = [table for table in found if table]
    return Section(key, title, "tables.html", {"tables": present, "details": []}, intro) if present else None


# In the order of the page. A new section of tables is a function that ends in `_tables(...)`, and a line here.
SECTIONS: tuple[Callable[[Context], Section | None], ...] = (
    ladder,
    overview,
    curves,
    training,
    samples,
    guidance,
    classes,
    denoising,
    neighbours,
    scores,
    latency,
    configs,
    starts,
)
