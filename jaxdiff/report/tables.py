"""Tables of the report: scores with their protocol, times, configs, starts."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxdiff.config.files import flatten
from jaxdiff.report import text
from jaxdiff.report.reading import Run, flat, mapping, number


class Cell(NamedTuple):
    """A cell of a table; `note` stands small below, `mark` as a badge."""

    text: str
    note: str = ""
    mark: str = ""
    code: bool = False


class Head(NamedTuple):
    """The head of a column."""

    text: str
    title: str = ""  # more words, for those who point at it or hear the page
    numeric: bool = False


class Table(NamedTuple):
    """A table for the template. `facts` stand above it, each a name and a value; `details` are tables folded below."""

    title: str
    head: list[Head]
    rows: list[list[Cell]]
    facts: list[tuple[str, str]] = []
    note: str = ""
    details: list[Any] = []


class Metric(NamedTuple):
    """A score: its short name, its meaning, and whether less of it is better."""

    label: str
    meaning: str
    lower: bool


# By the beginning of the name; what follows names the extractor, or "50k". In the order of columns.
METRICS = {
    "fid": Metric("FID", "Fréchet distance in InceptionV3's features", True),
    "fd": Metric("FD", "Fréchet distance of features", True),
    "rfd": Metric("rFD", "Fréchet distance of reconstructions", True),
    "sfid": Metric("sFID", "Fréchet distance of spatial features of InceptionV3", True),
    "sfd": Metric("sFD", "Fréchet distance of spatial features", True),
    "kid": Metric("KID", "kernel distance of features", True),
    "is": Metric("IS", "inception score", False),
    "precision": Metric("Precision", "share of the images within the reference's manifold", False),
    "recall": Metric("Recall", "share of the reference within the images' manifold", False),
    "knn_accuracy": Metric("kNN accuracy", "share to which nearest neighbours give the class asked for", False),
    "val_loss": Metric("Loss", "of validation images", True),
    "val_psnr": Metric("PSNR", "dB", False),
    "val_ssim": Metric("SSIM", "structural similarity", False),
}
COMPANIONS = ("_low", "_high", "_std", "_real")  # belong to the score before them
AT_FLOOR = 0.02  # a score within 2 % of its floor, or beyond, is as good as real images are
DRAWING = ("sampler", "steps", "guidance", "eta", "weights")  # fields of a protocol that `text.drawn` shows
NO_FLOOR = "no floor"


def metric(name: str) -> Metric | None:
    """What is known of a score `name`."""
    parts = name.split("_")
    for k in range(len(parts), 0, -1):
        if known := METRICS.get("_".join(parts[:k])):
            suffix = "_".join(parts[k:])
            return known._replace(label="FID 50k") if suffix == "50k" else known
    return None


def score_names(scores: Mapping[str, Any]) -> list[str]:
    """Names of the scores among `scores` that have a number, without their companions, the best known ones first."""
    plain = [name for name in scores if number(scores[name]) is not None]
    own = [n for n in plain if not any(n.endswith(c) and n.removesuffix(c) in scores for c in COMPANIONS)]
    order = list(METRICS.values())
    labels = [m.label for m in order]

    def place(name: str) -> int:
        known = metric(name)
        return labels.index(known.label.removesuffix(" 50k")) if known else len(order)

    return sorted(own, key=place)


def floor_of(record: Mapping[str, Any], name: str) -> float | None:
    """What real images score in place of `name`, None where the record does not say."""
    floor = number(record["floor"].get(name))
    return number(record["scores"].get(name + "_real")) if floor is None else floor


def at_floor(name: str, value: float, floor: float) -> bool:
    """Whether a score is as good as that of real images, to 2 %."""
    known, slack = metric(name), AT_FLOOR * abs(floor)
    return (value <= floor + slack) if known is None or known.lower else (value >= floor - slack)


def reference_of(record: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a record's scores are to be read with: the reference set, the extractor, and the floor, in words."""
    protocol = record["protocol"]
    reference, extractor, floor = (mapping(protocol.get(k)) for k in ("reference", "extractor", "floor"))

    def named(part: Mapping[str, Any], missing: str) -> str:
        name = str(part.get("name", missing))
        return f"{name}, {text.figures(part['num'])} images" if number(part.get("num")) is not None else name

    return named(reference, "not recorded"), str(extractor.get("name", "not recorded")), named(floor, "none")


def terse(record: Mapping[str, Any]) -> str:
    """N, reference set and extractor of a record in one line, without which no score is shown."""
    reference, extractor, _ = reference_of(record)
    return f"N = {text.figures(record['protocol'].get('num'))} against {reference}; extractor {extractor}"


def score_cell(record: Mapping[str, Any], name: str, places: int) -> Cell:
    """A score with its interval or deviation, and the floor."""
    scores, value, floor = record["scores"], number(record["scores"].get(name)), floor_of(record, name)
    if value is None:
        return Cell("–")
    low, high, std = (number(scores.get(name + c)) for c in ("_low", "_high", "_std"))
    shown = text.fixed(value, places)
    if std is not None:
        shown += f" ± {text.fixed(std, places)}"
    note = NO_FLOOR if floor is None else f"real {text.fixed(floor, places)}"
    if low is not None and high is not None:
        note = f"{text.fixed(low, places)} to {text.fixed(high, places)}; {note}"
    return Cell(shown, note, "at floor" if floor is not None and at_floor(name, value, floor) else "")


def whose(run: Run, record: Mapping[str, Any]) -> str:
    """The images of a record: a run's samples and how they were drawn, or a path."""
    protocol = record["protocol"]
    if protocol.get("images", "samples") != "samples":
        return str(protocol["images"])
    step = f"step {text.figures(protocol['step'])}" if number(protocol.get("step")) is not None else ""
    return ", ".join(filter(None, (text.drawn(protocol), step))) or "samples"


def record_tables(runs: Sequence[Run]) -> list[Table]:
    """The records of all runs: a table for each reference set, extractor and floor."""
    groups: dict[str, list[tuple[Run, dict[str, Any]]]] = {}
    for run in runs:
        for record in run.records:
            shared = [record["protocol"].get(key) for key in ("reference", "extractor", "floor")]
            groups.setdefault(json.dumps(shared, sort_keys=True, default=str), []).append((run, record))
    return [_record_table(rows) for rows in groups.values()]


def _record_table(rows: list[tuple[Run, dict[str, Any]]]) -> Table:
    records = [record for _, record in rows]
    names = score_names({name: value for record in reversed(records) for name, value in record["scores"].items()})
    places = {
        n: text.decimals(v for r in records for v in (r["scores"].get(n), floor_of(r, n)) if v is not None)
        for n in names
    }
    head = [Head("Run"), Head("Images"), Head("N", "number of images that are scored", True)]
    for name in names:
        known = metric(name)
        arrow = "" if known is None else " ↓" if known.lower else " ↑"
        better = "" if known is None else "; lower is better" if known.lower else "; higher is better"
        head.append(
            Head(
                f"{known.label if known else name}{arrow}",
                f"{name}{known and ': ' + known.meaning or ''}{better}",
                True,
            )
        )
    body = []
    for run, record in rows:
        cells = [score_cell(record, name, places[name]) for name in names]
        body.append(
            [Cell(run.name), Cell(whose(run, record)), Cell(text.figures(record["protocol"].get("num"))), *cells]
        )
    reference, extractor, floor = reference_of(records[0])
    facts = [("Reference", reference), ("Extractor", extractor), ("Real images (floor)", floor)]
    note = "“real” is what real images score at the same N: a score at its floor is as good as real at this N."
    return Table(f"Against {reference}", head, body, facts, note, [_protocols(rows)])


def _protocols(rows: list[tuple[Run, dict[str, Any]]]) -> Table:
    """The whole protocols of rows: what they share as facts, what differs as columns."""
    flats = [flat(record["protocol"]) | {"device": record.get("device")} for _, record in rows]
    fields = list(dict.fromkeys(field for protocol in flats for field in protocol))
    same = [f for f in fields if all(p.get(f) == flats[0].get(f) for p in flats)]
    differ = [f for f in fields if f not in same]
    head = [Head("Run"), *map(Head, differ)]
    body = [
        [Cell(run.name), *(Cell(text.setting(p.get(f))) for f in differ)]
        for (run, _), p in zip(rows, flats, strict=True)
    ]
    facts = [(field, text.setting(flats[0][field])) for field in same if flats[0].get(field) is not None]
    return Table("Complete protocol", head if differ else [], body if differ else [], facts)


def validation_table(runs: Sequence[Run]) -> Table | None:
    """The validation scores at the end of runs, each with N, reference and extractor as far as they are recorded."""
    body = []
    for run in runs:
        scores = run.validation
        for name in score_names(scores):
            if name.endswith("_images"):  # the N of another
                continue
            known, base = metric(name), name.split("_")[0]
            if number(scores.get(f"{base}_images")) is not None:
                count = text.figures(scores[f"{base}_images"])
            else:
                count = text.figures(run.config.sample.num) if name.startswith("knn_") else "not recorded"
            floor = number(scores.get(name + "_real"))
            value = text.figures(scores[name])
            body.append(
                [
                    Cell(run.name),
                    Cell(known.label if known else name, name if known else ""),
                    Cell(
                        value,
                        f"real {text.figures(floor)}" if floor is not None else "",
                        _mark(name, scores[name], floor),
                    ),
                    Cell(count),
                    Cell("training images" if name.startswith("knn_") else "validation images"),
                    Cell(_extractor(name)),
                ]
            )
    head = [
        Head("Run"),
        Head("Score"),
        Head("Value", numeric=True),
        Head("N", numeric=True),
        Head("Reference"),
        Head("Extractor"),
    ]
    return Table("Validation", head, body) if body else None


def _mark(name: str, value: float, floor: float | None) -> str:
    return "at floor" if floor is not None and at_floor(name, value, floor) else ""


def _extractor(name: str) -> str:
    if "effnet_lite0" in name:
        return "effnet_lite0"
    if name.startswith("knn_"):
        return "8x8 grey pixels"
    return "inception_v3" if name.startswith(("fid", "sfid", "rfid")) else "none: pixels"


def latency_table(runs: Sequence[Run]) -> Table | None:
    """How long drawing took, of every record of samples that says so; compilation stands apart."""
    entries = []
    for run in runs:
        for record in run.records:
            protocol, seconds = record["protocol"], record["seconds"]
            taken, n = number(seconds.get("sampling")), number(protocol.get("num"))
            if taken and protocol.get("images", "samples") == "samples":
                sampler = str(protocol.get("sampler", "–"))
                order = [number(protocol.get(k)) or 0 for k in ("steps", "guidance")]
                cells = [Cell(run.name), Cell(sampler)]
                cells += [Cell(text.setting(protocol.get(k))) for k in ("steps", "guidance")]
                cells += [Cell(text.figures(n)), Cell(text.duration(taken)), Cell(text.figures(n and n / taken, 3))]
                cells += [Cell(text.duration(seconds.get("compile"))), Cell(str(record.get("device") or "–"))]
                entries.append(((sampler, *order), cells))
    names = ("Run", "Sampler", "Steps", "Guidance w", "N", "Sampling", "Images/s", "Compilation", "Device")
    head = [Head(name, numeric=2 <= k < 8) for k, name in enumerate(names)]
    body = [cells for _, cells in sorted(entries, key=lambda entry: entry[0])]
    return (
        Table("Time of sampling", head, body, note="Sampling is without compilation, which is paid once.")
        if body
        else None
    )


def config_tables(runs: Sequence[Run]) -> list[Table]:
    """The fields in which several configs differ, and apart from them those that only some have."""
    flats = [flatten(run.config) for run in runs]
    fields = sorted({field for config in flats for field in config})
    head = [Head("Field"), *(Head(run.name) for run in runs)]

    def rows(chosen: Iterable[str]) -> list[list[Cell]]:
        return [[Cell(f, code=True), *(Cell(text.setting(c[f]) if f in c else "–") for c in flats)] for f in chosen]

    common = [f for f in fields if all(f in config for config in flats)]
    differ = [f for f in common if any(config[f] != flats[0][f] for config in flats)]
    partly = Table("Fields that only some have", head, rows(f for f in fields if f not in common))
    note = "" if differ else "All fields that every run has are the same."
    table = Table("What differs", head if differ else [], rows(differ), [], note, [partly] if partly.rows else [])
    return [table] if len(runs) > 1 else []


def start_table(run: Run) -> Table | None:
    """Every start of a run: when, on what, how; its packages folded below."""
    body, details = [], []
    for k, start in enumerate(run.starts, 1):
        compiled = "; ".join(f"{name} {text.duration(s)}" for name, s in mapping(start.get("compile_seconds")).items())
        cells = [Cell(text.moment(start.get("time", "–"))), Cell(str(start.get("mode", "–")))]
        cells += [Cell(str(start.get("command", "–")), code=True), Cell(str(start.get("device", "–")))]
        cells += [Cell(str(start.get("python", "–"))), Cell(compiled or "–")]
        body.append(cells)
        packages = [(str(name), str(version)) for name, version in mapping(start.get("packages")).items()]
        if packages and (not details or details[-1].facts != packages):
            details.append(Table(f"Packages from start {k} on", [], [], packages))
    head = [Head(name) for name in ("Time", "Mode", "Command", "Device", "Python", "Compilation")]
    return Table(run.name, head, body, details=details) if body else None
