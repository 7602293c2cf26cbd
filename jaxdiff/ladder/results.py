"""RESULTS.md: the tables of a ladder, from the files of its workdir."""

import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxdiff.config import files
from jaxdiff.evaluation.evaluate import DECISIVE, with_fields
from jaxdiff.evaluation.records import Record, read_scores
from jaxdiff.ladder.rungs import read_ladder, rung_config, rung_names

FILE = "RESULTS.md"
SPREAD = re.compile(r"^([a-z]+)_(low|high|std)(_.+)?$")  # kid_low_effnet_lite0 belongs to kid_effnet_lite0


class Row(NamedTuple):
    """A line of a table: what it is called, and the training and its fields `sample` that the record is of."""

    label: str
    rung: str
    changed: dict[str, Any]


class Table(NamedTuple):
    """A table of the study: its title, what is compared, and its lines. With `speedup`, times against the first."""

    title: str
    compared: Callable[[ConfigDict], str]
    rows: Callable[[ConfigDict], list[Row]]
    speedup: bool = False


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
    Table(
        "1. DDPM in pixels", lambda config: "The pixel model, drawn with its own sampler, against real images.", _ddpm
    ),
    Table(
        "2. DDIM from the same checkpoint",
        lambda config: (
            "One checkpoint, other samplers: what fewer steps cost in quality and save in time. "
            "Speed-up is seconds of the first line over seconds of the line."
        ),
        _ddim,
        speedup=True,
    ),
    Table("3. Latent diffusion", lambda config: "The latent model without guidance, against real images.", _latent),
    Table(
        "4. Guidance",
        lambda config: "One latent checkpoint at several w in (1 + w) cond - w uncond; w = 0 is table 3.",
        _guided,
    ),
    Table(
        "5. Techniques",
        lambda config: (
            "Each a latent diffusion of its own on the same autoencoder, with the named fields changed; w = 0."
        ),
        _techniques,
    ),
)


def write_results(workdir: pathlib.Path) -> None:
    """Write the RESULTS.md of a ladder's workdir anew."""
    (workdir / FILE).write_text(results(workdir), encoding="utf-8")


def results(workdir: pathlib.Path) -> str:
    """The RESULTS.md of a ladder's workdir: what its files say, with "not yet" where they say nothing."""
    config = files.load(workdir / "config.json")
    parts = [f"# {config.name}", _head(config, workdir), "## Trainings", *_trainings(config, workdir)]
    for table in TABLES:
        parts += [f"## {table.title}", table.compared(config), *_table(table, config, workdir)]
    return "\n\n".join(parts) + "\n"


def _head(config: ConfigDict, workdir: pathlib.Path) -> str:
    path, rungs = workdir / "starts.jsonl", read_ladder(workdir)["rungs"]
    lines = path.read_text().splitlines() if path.exists() else []
    starts = [start for line in lines if "command" in (start := json.loads(line))]
    d = config.data
    told = [f"Data set: {' '.join(filter(None, (d.source, d.name, d.path)))}"]
    for rung in ("ddpm", "ldm"):
        told[0] += f"; {'pixels' if rung == 'ddpm' else 'latents'} of {config[rung].data.image_size}-pixel images"
    if rungs:
        first = next(iter(rungs.values()))
        told[0] += f"; {first['images']:,} training images in {first['classes']} classes"
    if config.ddpm.data.image_size != config.ldm.data.image_size:
        told.append("Sizes: scores are against real images of the same size; tables 1 and 2 do not compare with 3 to 5")
    spent = sum(rung["train_seconds"] + rung["score_seconds"] for rung in rungs.values())
    told.append(f"Budget: {config.minutes:g} minutes; spent so far on training, sampling and scoring: {spent / 60:.1f}")
    for start in starts[-1:]:
        versions = ", ".join(f"{name} {version}" for name, version in start["packages"].items())
        told.append(
            f"Hardware: {start['device']}, {start['processes']} process(es); Python {start['python']}, {versions}"
        )
        told.append(f"Command: `{start['command']}`")
        told.append(f"Code: {start.get('git', 'not from a git checkout')}; seed {config.seed}")
        times = [starts[0]["time"], *([start["time"]] if len(starts) > 1 else [])]
        told.append(f"Date: begun {times[0]}" + (f", {len(starts)} starts, the last {times[1]}" if times[1:] else ""))
    return "\n".join(f"- {line}" for line in told)


def _trainings(config: ConfigDict, workdir: pathlib.Path) -> list[str]:
    rungs, rows = read_ladder(workdir)["rungs"], []
    for name in rung_names(config):
        if name not in rungs:
            rows.append([name, *["not yet"] * 2, *[""] * 5])
            continue
        r = rungs[name]
        validation = read_scores(workdir / name)["validation"]
        # The autoencoder has no samples to be scored by; the loss says little of it.
        told = validation if name == "autoencoder" else {n: v for n, v in validation.items() if n == "val_loss"}
        cells = ", ".join(f"{n} {_number(v)}" for n, v in told.items()) or "not yet"
        wall = [f"{r[field] / 60:.1f}" for field in ("train_seconds", "score_seconds")]
        share = f"{r['share_seconds'] / 60:.1f}"
        rows.append(
            [name, f"{r['steps']:,}", f"{r['recipe']:,}", r["limit"], f"{r['step_seconds']:.3g}", share, *wall, cells]
        )
    heads = ["training", "steps", "of the recipe", "set by", "s/step", "share, min", "trained, min", "scored, min"]
    over = [name for name, r in rungs.items() if r["limit"] == "minimum"]
    note = (
        "Steps were measured and chosen before each training: the recipe's, or fewer where its share of the budget "
        "ends (the learning rate falls to 0 within them). Trained: with validation, checkpoints and first samples with "
        "scores; scored: further samples and scores."
    )
    if over:
        note += f" The share of {', '.join(over)} was too small for the least number of steps, {config.least_steps:,}."
    return [note, _markdown([*heads, "validation"], rows)]


def _table(table: Table, config: ConfigDict, workdir: pathlib.Path) -> list[str]:
    """What its numbers were measured with, and the table."""
    rows = table.rows(config)
    found = [(row, _find(row, config, workdir)) for row in rows]
    records = [(row, record) for row, record in found if record]
    if not records:
        return ["Not yet."]
    groups: dict[str, tuple[list[str], Record]] = {}
    for row, record in records:
        groups.setdefault(protocol(record), ([], record))[0].append(row.label)
    several = len(groups) > 1
    told = [f"{'; '.join(labels)}: {words}" if several else words for words, (labels, _) in groups.items()]
    names = list(dict.fromkeys(name for _, record in records for name in record["scores"] if not SPREAD.match(name)))
    base = found[0][1]
    lines = []
    for row, own in found:
        if own is None:
            lines.append([row.label, "not yet"])
            continue
        seconds, num = own["seconds"], own["protocol"]["num"]
        sampling = seconds["sampling"]
        cells = [row.label, f"{own['protocol']['step']:,}", *(_score(name, own["scores"]) for name in names)]
        cells += [f"{sampling:.3g}", f"{num / sampling:.3g}", f"{seconds['compile']:.3g}"]
        if table.speedup:  # all of a ladder's records are of as many samples
            cells.append(f"{base['seconds']['sampling'] / sampling:.2f}" if base else "")
        lines.append(cells)
    for labels, record in groups.values():
        if floor := record["floor"]:
            of = f" ({'; '.join(labels)})" if several else ""
            lines.append([f"real images: floor{of}", "", *(_score(name, floor) for name in names)])
    heads = ["", "trained steps", *names, "sampling, s", "images/s", "compiling, s"]
    return [
        "\n".join(f"- {line}" for line in told),
        _markdown([*heads, *(["speed-up"] if table.speedup else [])], lines),
    ]


def protocol(record: Record) -> str:
    """In words, what a record's scores were measured with, but for the sampler: all that a table has in common."""
    p = record["protocol"]
    words = [f"N = {p['num']:,} {p['images']}, labels {p['labels']}, {p['weights']} weights, seed {p['seed']}"]
    if "reference" in p:
        real, floor, e = p["reference"], p["floor"], p["extractor"]
        words.append(f"reference: {real['num']:,} {real['name']} images (SHA-256 {real['sha256'][:12]})")
        words.append(f"floor: {floor['num']:,} {floor['name']} images in place of the samples")
        words.append(f"extractor {e['name']} ({e['weights']}), resize {e['resize']}")
        words += [f"{name} = {p[name]}" for name in ("k", "splits") if name in p]
    words.append(f"on {record['device']}")
    return "; ".join(words)


def _find(row: Row, config: ConfigDict, workdir: pathlib.Path) -> Record | None:
    """The newest record of the samples that a row is of, of the steps that were decided on."""
    decided = read_ladder(workdir)["rungs"].get(row.rung)
    if decided is None:
        return None
    settings = with_fields(rung_config(config, row.rung, workdir).sample, **row.changed)
    wanted = json.loads(json.dumps({name: settings[name] for name in DECISIVE}))
    wanted |= {"images": "samples", "num": config.eval.num or settings.num, "step": decided["steps"]}
    records = read_scores(workdir / row.rung)["records"]
    fits = (r for r in reversed(records) if all(r["protocol"].get(name) == value for name, value in wanted.items()))
    return next(fits, None)


def _score(name: str, scores: dict[str, float]) -> str:
    """A score with its interval or deviation, where there are such."""
    if name not in scores:
        return ""
    own = {}
    for other, value in scores.items():
        if (match := SPREAD.match(other)) and match[1] + (match[3] or "") == name:
            own[match[2]] = value
    text = _number(scores[name])
    if "low" in own and "high" in own:
        text += f" [{_number(own['low'])}, {_number(own['high'])}]"
    return text + (f" ± {_number(own['std'])}" if "std" in own else "")


def _number(value: float | None) -> str:
    return f"{value:.4g}" if value is not None and math.isfinite(value) else "not finite"


def _markdown(heads: list[str], rows: Iterable[list[str]]) -> str:
    width = len(heads)
    lines = [heads, ["---"] * width, *([*row, *[""] * (width - len(row))] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
