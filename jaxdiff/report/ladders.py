"""The section of a ladder: its tables, and a picture with a row of samples for each of their lines."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from jaxdiff import images
from jaxdiff.errors import ConfigError
from jaxdiff.evaluation.evaluate import with_fields
from jaxdiff.evaluation.records import SHA256
from jaxdiff.ladder.rungs import rung_config
from jaxdiff.ladder.tables import NOT_YET, Filled, Line, facts, fill, trainings
from jaxdiff.report import scores as scoring
from jaxdiff.report import text
from jaxdiff.report.pictures import Album, cells, evenly
from jaxdiff.report.reading import Ladder, class_names, read_arrays
from jaxdiff.report.tables import Cell, Head, Table
from jaxdiff.samples import WORDNET_ID, label_names, sample_labels

CLASSES = 10  # columns of the picture
HEADS = ("Sampling, s", "Images/s", "Compiling, s")


def describe(ladder: Ladder, album: Album) -> dict[str, Any]:
    """For the template: {"name", "figure", "protocol", "tables": [{"title", "compared", "table"}], "details"}."""
    records = {name: run.records for name, run in ladder.runs.items()}
    tables = fill(ladder.config, ladder.rungs, records)
    trained = trainings(ladder.config, ladder.rungs, {name: run.validation for name, run in ladder.runs.items()})
    head = [Head(words[:1].upper() + words[1:], numeric=0 < k < 8 and k != 3) for k, words in enumerate(trained.head)]
    made = [(name, SHA256.sub(r"\1...", value)) for name, value in facts(ladder.config, ladder.rungs, ladder.starts)]
    return {
        "name": ladder.config.name,
        "figure": picture(ladder, tables, album),
        "protocol": protocols(tables),
        "tables": [{"title": f.table.title, "compared": f.table.compared, "table": table_of(f)} for f in tables],
        "details": [
            Table("The trainings and their steps", head, [list(map(Cell, r)) for r in trained.rows], note=trained.note),
            Table("What it was made with", [], [], made),
        ],
    }


def table_of(filled: Filled) -> Table:
    """A table of the ladder for the page."""
    lines = [line for line in filled.lines if line.record]
    records = [line.record for line in lines if line.record]
    names = scoring.score_names({name: value for r in reversed(records) for name, value in r["scores"].items()})
    columns = [scoring.score_column(records, name, digits=4) for name in names]
    heads = [*HEADS, *(["Speed-up"] if filled.table.speedup else [])]
    body = []
    for line in filled.lines:
        label, _, changed = line.row.label.partition(": ")
        first = Cell(label, (changed,) if changed else ())
        if line.record is None:
            body.append([first, Cell(NOT_YET), *[Cell("")] * (len(names) + len(heads))])
            continue
        k, seconds, num = lines.index(line), line.record["seconds"], line.record["protocol"]["num"]
        row = [first, Cell(text.figures(line.record["protocol"]["step"])), *(column[k] for column in columns)]
        row += [Cell(text.fixed(seconds["sampling"], 2)), Cell(text.figures(num / seconds["sampling"], 3))]
        row.append(Cell(text.fixed(seconds.get("compile"), 1)))
        if filled.table.speedup:
            row.append(Cell("–" if line.speedup is None else f"{text.fixed(line.speedup, 2)}×"))
        body.append(row)
    head = [Head("Samples"), Head("Trained steps", numeric=True), *map(scoring.score_head, names)]
    head += [Head(word, numeric=True) for word in heads]
    return Table(filled.table.title, head, body)


def protocols(tables: Sequence[Filled]) -> list[tuple[str, str]]:
    """What all scores were measured with, and what only those of some tables, or lines of one, were."""
    whose: dict[tuple[str, ...], list[str]] = {}
    for filled in tables:
        for words, lines in filled.protocols.items():
            number = filled.table.title.partition(".")[0]
            which = f" ({', '.join(line.row.label for line in lines)})" if len(filled.protocols) > 1 else ""
            whose.setdefault(words, []).append(number + which)
    common = [word for word in next(iter(whose), ()) if all(word in words for words in whose)]
    told = [("All tables" if len(whose) > 1 else "Measured with", "; ".join(common))] if common else []
    for words, numbers in whose.items():
        if own := [word for word in words if word not in common]:
            told.append((f"Table{'s' * (len(numbers) > 1)} {', '.join(numbers)}", "; ".join(own)))
    return [(name, SHA256.sub(r"\1...", words)) for name, words in told]


def picture(ladder: Ladder, tables: Sequence[Filled], album: Album) -> dict[str, Any] | None:
    """Figure 1, of the grids of the records: {"picture", "rows", "columns", "note"}; None where there is none yet.

    All rows are of the same classes, those of smaller images enlarged.
    """
    lines: dict[str, Line] = {}  # each once, though several tables have it
    for line in (line for filled in tables for line in filled.lines):
        lines.setdefault(json.dumps([line.row.rung, line.row.changed]), line)
    drawn = [strip for line in lines.values() if (strip := _strip(ladder, line))]
    if not drawn:
        return None
    sizes = list(dict.fromkeys(strip.size for strip in drawn))
    strips = []
    for size in sizes:
        strips += [strip for strip in drawn if strip.size == size]
        strips += _real(ladder, size, f", {size}×{size}" if len(sizes) > 1 else "")
    labelled = next((strip.classes for strip in drawn if strip.classes is not None), np.zeros(0, np.int32))
    chosen = evenly(sorted(set(labelled.tolist())), CLASSES)
    columns = chosen or list(range(min(CLASSES, *(len(strip.pixels) for strip in drawn))))
    pixels = [_enlarged(strip.of(label), max(sizes)) for strip in strips for label in columns]
    known = next(filter(None, map(class_names, ladder.runs.values())), [])
    names = [WORDNET_ID.sub("", known[label]) if label < len(known) else str(label) for label in chosen]
    rows = [strip.label for strip in strips]
    alt = f"Rows from the top: {'; '.join(rows)}" + (f". Columns: {', '.join(names)}" if names else "")
    if (added := album.add(images.grid(np.stack(pixels), len(columns)), alt)) is None:
        return None
    seeds = sorted({line.record["protocol"]["seed"] for line in lines.values() if line.record})
    note = f"The first of the scored samples{' of each class' if names else ''}, not the best; seed {seeds[0]}"
    note += " in all rows." if len(seeds) == 1 else "."  # else of the first row
    if len(sizes) > 1:
        note += f" Enlarged to {max(sizes)}×{max(sizes)} where they are smaller."
    if missing := [line.row.label.partition(":")[0] for line in lines.values() if not line.record]:
        note += f" Not yet: {'; '.join(missing)}."
    return {"picture": added, "rows": rows, "columns": names, "note": note}


class Strip(NamedTuple):
    """A row of the picture: images of one size, and their classes where they have such."""

    label: str
    pixels: UInt8[np.ndarray, "n h w 3"]
    classes: Int[np.ndarray, " n"] | None

    @property
    def size(self) -> int:
        """Height and width."""
        return self.pixels.shape[1]

    def of(self, label: int) -> UInt8[np.ndarray, "h w 3"]:
        """The first image of a class, or where there are none the one at that place; white where there is none."""
        places = np.arange(len(self.pixels)) if self.classes is None else self.classes
        found = np.flatnonzero(places == label)
        return self.pixels[found[0]] if len(found) else np.full_like(self.pixels[0], 255)


def _strip(ladder: Ladder, line: Line) -> Strip | None:
    """The images in the grid of a line's record."""
    name = line.record and line.record["pictures"].get("samples")
    if line.record is None or not isinstance(name, str):
        return None
    run, decided = ladder.runs[line.row.rung], ladder.rungs[line.row.rung]
    own = rung_config(ladder.config, line.row.rung)
    try:
        with Image.open(run.workdir / name) as file:
            pixels = cells(np.asarray(file.convert("RGB")), decided["image_size"])
        names = class_names(run) or [str(k) for k in range(decided["classes"])]
        settings = with_fields(own.sample, num=line.record["protocol"]["num"])
        labels = sample_labels(settings, label_names(own, names))
    except (OSError, ValueError, SyntaxError, ConfigError):  # half written, or of classes that there are not
        return None
    if pixels is None:
        return None
    pixels = pixels[: len(labels)]
    return Strip(line.row.label.partition(":")[0], pixels, labels[: len(pixels)] if own.model.conditional else None)


def _real(ladder: Ladder, size: int, suffix: str) -> list[Strip]:
    """Real images of a size, if a rung has kept such."""
    for run in ladder.runs.values():
        kept = read_arrays(run.workdir / "samples" / "real.npz", "arr_0", "arr_1")
        if kept and kept["arr_0"].shape[1:] == (size, size, 3) and len(kept["arr_0"]) == len(kept["arr_1"]):
            return [Strip(f"real images{suffix}", kept["arr_0"], kept["arr_1"])]
    return []


def _enlarged(pixels: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "H W 3"]:
    how = Image.Resampling.NEAREST if size % len(pixels) == 0 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(pixels).resize((size, size), how))
