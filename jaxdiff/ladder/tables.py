"""The tables of a ladder as data: what each compares, and what the records of the trainings say of it."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxdiff.config import files
from jaxdiff.evaluation.evaluate import DECISIVE, labels_in_words, with_fields
from jaxdiff.evaluation.records import Record, without_companions
from jaxdiff.ladder.rungs import rung_config, rung_names

Rungs = Mapping[str, Mapping[str, Any]]  # of ladder.json
NOT_YET = "not yet"
STARTED = ("time", "command", "python", "packages", "device", "processes")  # fields of a start


class Row(NamedTuple):
    """A line of a table: what it is called, and the training and its fields `sample` that the record is of."""

    label: str
    rung: str
    changed: dict[str, Any]


class Table(NamedTuple):
    """A table of the study: its title, what is compared, and its lines. With `speedup`, times against the first."""

    title: str
    compared: str
    rows: Callable[[ConfigDict], list[Row]]
    speedup: bool = False


class Line(NamedTuple):
    """A line with its record, None where there is none yet, and the seconds of the first line over its own."""

    row: Row
    record: Record | None
    speedup: float | None = None


class Filled(NamedTuple):
    """A table with what there is.

    scores: names of what its records hold, without bounds and the like. protocols: what they were measured with, in
    words, and the lines that this is true of.
    """

    table: Table
    lines: list[Line]
    scores: list[str]
    protocols: dict[tuple[str, ...], list[Line]]


class Trainings(NamedTuple):
    """The table of the trainings, and what is to be known of it."""

    note: str
    head: list[str]
    rows: list[list[str]]


def _ddim(config: ConfigDict) -> list[Row]:
    steps = [Row(f"DDIM, {n} steps", "ddpm", {"sampler": "ddim", "steps": n, "eta": 0.0}) for n in config.eval.steps]
    return [*_ddpm(config), *steps]


def _ddpm(config: ConfigDict) -> list[Row]:
    s = config.ddpm.sample
    return [Row(f"{s.sampler.upper()}, {s.steps} steps", "ddpm", {})]


def _latent(config: ConfigDict) -> list[Row]:
    return [Row("latent diffusion, w = 0", "ldm", {})]


def _guided(config: ConfigDict) -> list[Row]:
    return [*_latent(config), *(Row(f"w = {w:g}", "ldm", {"guidance": w}) for w in config.guidance)]


def _techniques(config: ConfigDict) -> list[Row]:
    def label(name: str) -> str:
        changed = files.flatten(config.techniques[name])
        return f"{name}: " + ", ".join(f"{field} = {value}" for field, value in changed.items())

    own = [Row(label(name), name, {}) for name in rung_names(config) if name in config.techniques]
    return [Row("base: latent diffusion", "ldm", {}), *own]


TABLES = (
    Table("1. DDPM in pixels", "The pixel model, drawn with its own sampler, against real images.", _ddpm),
    Table(
        "2. DDIM from the same checkpoint",
        "One checkpoint, other samplers: what fewer steps cost in quality and save in time. "
        "Speed-up is seconds of the first line over seconds of the line.",
        _ddim,
        speedup=True,
    ),
    Table("3. Latent diffusion", "The latent model without guidance, against real images.", _latent),
    Table(
        "4. Guidance",
        "One latent checkpoint at several w in (1 + w) cond - w uncond; w = 0 is table 3.",
        _guided,
    ),
    Table(
        "5. Techniques",
        "Each a latent diffusion of its own on the same autoencoder, with the named fields changed; w = 0.",
        _techniques,
    ),
)


def fill(config: ConfigDict, rungs: Rungs, records: Mapping[str, Sequence[Record]]) -> list[Filled]:
    """The tables of a ladder, from what was decided of its rungs and the records in their workdirs."""
    return [_fill(table, config, rungs, records) for table in TABLES]


def _fill(table: Table, config: ConfigDict, rungs: Rungs, records: Mapping[str, Sequence[Record]]) -> Filled:
    lines = [Line(row, _find(row, config, rungs, records.get(row.rung, ()))) for row in table.rows(config)]
    scores: dict[str, None] = {}
    protocols: dict[tuple[str, ...], list[Line]] = {}
    base = lines[0].record
    for k, (line, record) in enumerate([(line, line.record) for line in lines]):
        if record is None:
            continue
        if table.speedup and base:  # all of a ladder's records are of as many samples
            line = lines[k] = line._replace(speedup=base["seconds"]["sampling"] / record["seconds"]["sampling"])
        scores |= dict.fromkeys(without_companions(record["scores"]))
        protocols.setdefault(protocol(record), []).append(line)
    return Filled(table, lines, list(scores), protocols)


def _find(row: Row, config: ConfigDict, rungs: Rungs, records: Sequence[Record]) -> Record | None:
    """The newest record of the samples that a row is of, of the steps that were decided on."""
    if row.rung not in rungs:
        return None
    own, decided = rung_config(config, row.rung), rungs[row.rung]
    settings = with_fields(own.sample, **row.changed)
    wanted = json.loads(json.dumps({name: settings[name] for name in DECISIVE}))
    wanted |= {"images": "samples", "num": config.eval.num or settings.num, "step": decided["steps"]}
    wanted["labels"] = labels_in_words(own, settings, decided["classes"])

    def fits(record: Record) -> bool:
        p = record["protocol"]
        found = (p.get(name, files.ADDED_FIELDS.get(f"sample.{name}")) for name in wanted)  # older than a field
        return all(json.loads(json.dumps(a)) == b for a, b in zip(found, wanted.values(), strict=True))

    return next((r for r in reversed(records) if fits(r) and r["seconds"].get("sampling")), None)


def protocol(record: Record) -> tuple[str, ...]:
    """In words, what a record's scores were measured with, but for the sampler: all that a table has in common."""
    p = record["protocol"]
    how = f"{p['weights']} weights" + (f", {p['dtype']}" if "dtype" in p else "")
    words = [f"N = {p['num']:,} {p['images']}, labels {p['labels']}, {how}, seed {p['seed']}"]
    if "reference" in p:
        real, floor, e = p["reference"], p["floor"], p["extractor"]
        words.append(f"reference: {real['num']:,} {real['name']} images (SHA-256 {real['sha256'][:12]})")
        words.append(f"floor: {floor['num']:,} {floor['name']} images in place of the samples")
        words.append(f"extractor {e['name']} ({e['weights']}), resize {e['resize']}")
        words += [f"{name} = {p[name]}" for name in ("k", "splits") if name in p]
    return *words, f"on {record['device']}"


def facts(config: ConfigDict, rungs: Rungs, starts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What the whole ladder was made of, with and when: names and values."""
    starts = [start for start in starts if set(STARTED) <= set(start)]
    d = config.data
    data = " ".join(filter(None, (d.source, d.name, d.path)))
    for rung in ("ddpm", "ldm"):
        data += f"; {'pixels' if rung == 'ddpm' else 'latents'} of {config[rung].data.image_size}-pixel images"
    if rungs:
        first = next(iter(rungs.values()))
        data += f"; {first['images']:,} training images in {first['classes']} classes"
    told = [("Data set", data)]
    if config.ddpm.data.image_size != config.ldm.data.image_size:
        same = "scores are against real images of the same size; tables 1 and 2 do not compare with 3 to 5"
        told.append(("Sizes", same))
    spent = sum(rung["train_seconds"] + rung["score_seconds"] for rung in rungs.values())
    budget = f"{config.minutes:g} minutes; spent so far on training, sampling and scoring: {spent / 60:.1f}"
    told.append(("Budget", budget))
    for start in starts[-1:]:
        versions = ", ".join(f"{name} {version}" for name, version in start["packages"].items())
        hardware = f"{start['device']}, {start['processes']} process(es); Python {start['python']}, {versions}"
        times = [starts[0]["time"], *([start["time"]] if len(starts) > 1 else [])]
        told += [
            ("Hardware", hardware),
            ("Command", start["command"]),
            ("Code", f"{start.get('git', 'not from a git checkout')}; seed {config.seed}"),
            ("Date", f"begun {times[0]}" + (f", {len(starts)} starts, the last {times[1]}" if times[1:] else "")),
        ]
    return told


def trainings(config: ConfigDict, rungs: Rungs, validation: Mapping[str, Mapping[str, Any]]) -> Trainings:
    """How long each training was to be, and was; and its validation metrics."""
    rows = []
    for name in rung_names(config):
        if name not in rungs:
            rows.append([name, *[NOT_YET] * 2, *[""] * 6])
            continue
        r, told = rungs[name], validation.get(name, {})
        if name != "autoencoder":  # which has no samples to be scored by; the loss says little of it
            told = {n: v for n, v in told.items() if n in ("val_loss", "val_images")}
        cells = ", ".join(f"{n} {figure(v)}" for n, v in told.items()) or NOT_YET
        wall = [f"{r[field] / 60:.1f}" for field in ("train_seconds", "score_seconds")]
        share = f"{r['share_seconds'] / 60:.1f}"
        rows.append(
            [name, f"{r['steps']:,}", f"{r['recipe']:,}", r["limit"], f"{r['step_seconds']:.3g}", share, *wall, cells]
        )
    head = ["training", "steps", "of the recipe", "set by", "s/step", "share, min", "trained, min", "scored, min"]
    note = (
        "Steps were measured and chosen before each training: the recipe's, or fewer where its share of the budget "
        "ends (the learning rate falls to 0 within them). Trained: with validation, checkpoints and first samples with "
        "scores; scored: further samples and scores."
    )
    if over := [name for name, r in rungs.items() if r["limit"] == "minimum"]:
        note += f" The share of {', '.join(over)} was too small for the least number of steps, {config.least_steps:,}."
    return Trainings(note, [*head, "validation"], rows)


def figure(value: float | None) -> str:
    """A number with four significant digits, a whole one with all of its own."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if value is not None and math.isfinite(value) else "not finite"
