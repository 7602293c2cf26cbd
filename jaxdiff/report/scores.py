"""Scores with their complete protocol, as cells and tables."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxdiff.evaluation.records import without_companions
from jaxdiff.report import text
from jaxdiff.report.reading import Run, flat, mapping, number
from jaxdiff.report.tables import Cell, Head, Table


class Metric(NamedTuple):
    """A score: its short name, its meaning, and whether less of it is better; None where neither is."""

    label: str
    meaning: str
    lower: bool | None


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
    "nearest_train": Metric("Nearest", "median distance to the nearest training image", None),
    "bits_per_dim": Metric("Bits/dim", "bound on the negative log-likelihood of images", True),
    "bits_per_dim_prior": Metric("of it the prior", "KL at the noisiest timestep", True),
    "latent_bits_per_dim": Metric("Bits/dim of latents", "bound of the latents' model, not of images", True),
    "latent_bits_per_dim_prior": Metric("of it the prior of latents", "KL at the noisiest timestep", True),
    "val_loss": Metric("Loss", "of validation images", True),
    "val_psnr": Metric("PSNR", "dB", False),
    "val_ssim": Metric("SSIM", "structural similarity", False),
}
AT_FLOOR = 0.02  # a score within 2 % of its floor, or beyond, is as good as real images are
BETTER = {None: ("", ""), True: (" ↓", "; lower is better"), False: (" ↑", "; higher is better")}
# Fields of a protocol that are columns where rows differ in them: heads.
DRAWING: dict[str, tuple[str, str, bool]] = {
    "images": ("Images", "", False),
    "sampler": ("Sampler", "", False),
    "steps": ("Steps", "of sampling", True),
    "guidance": ("w", "weight of guidance", True),
    "eta": ("eta", "", True),
    "spacing": ("Spacing", "", False),
    "weights": ("Weights", "", False),
    "step": ("Training step", "of the checkpoint", True),
    "labels": ("Labels", "", False),
    "dtype": ("Computed in", "", False),
}


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
    own = [name for name in without_companions(scores) if number(scores[name]) is not None]
    order = list(METRICS.values())
    labels = [m.label for m in order]

    def place(name: str) -> int:
        known = metric(name)
        return labels.index(known.label.removesuffix(" 50k")) if known else len(order)

    return sorted(own, key=place)


def floor_of(record: Mapping[str, Any], name: str) -> float | None:
    """What real images score in place of `name`, None where the record does not say."""
    floor = number(record["floor"].get(name))
    return beside(record["scores"], name, "real") if floor is None else floor


def beside(scores: Mapping[str, Any], name: str, word: str) -> float | None:
    """What is recorded with the score `name` as its "low", "high", "std" or "real"; None where that is no number."""
    return number(without_companions(scores).get(name, {}).get(word))


def at_floor(name: str, value: float, floor: float) -> bool:
    """Whether a score is as good as that of real images, to 2 %."""
    return sign(name) != 0 and sign(name) * (value - floor) <= AT_FLOOR * abs(floor)


def sign(name: str) -> int:
    """1 where less of a score is better, -1 where more is, 0 where neither is, or it is not known."""
    known = metric(name)
    return 0 if known is None or known.lower is None else 1 if known.lower else -1


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
    low, high, std = (beside(scores, name, word) for word in ("low", "high", "std"))
    shown = text.fixed(value, places)
    if std is not None:
        shown += f" ± {text.fixed(std, places)}"
    notes = ["no floor" if floor is None else f"real {text.fixed(floor, places)}"]
    if low is not None and high is not None:
        notes.insert(0, f"{text.fixed(low, places)} to {text.fixed(high, places)}")
    return Cell(shown, tuple(notes), "at floor" if floor is not None and at_floor(name, value, floor) else "")


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
            shared = [record["protocol"].get(key) for key in ("reference", "extractor", "floor", "bound")]
            groups.setdefault(json.dumps(shared, sort_keys=True, default=str), []).append((run, record))
    return [_record_table(rows) for rows in groups.values()]


def _record_table(rows: list[tuple[Run, dict[str, Any]]]) -> Table:
    records = [record for _, record in rows]
    protocols = [record["protocol"] for record in records]
    names = score_names({name: value for record in reversed(records) for name, value in record["scores"].items()})
    varying = [f for f in DRAWING if len({text.setting(p[f]) for p in protocols if p.get(f) is not None}) > 1]
    head = [Head("Run"), *(Head(*DRAWING[f]) for f in varying), Head("N", "number of images that are scored", True)]
    head += map(score_head, names)
    columns = [score_column(records, name) for name in names]
    body = []
    for k, (run, record) in enumerate(rows):
        cells = [Cell(text.setting(record["protocol"].get(f))) for f in varying]
        n = Cell(text.figures(record["protocol"].get("num")))
        body.append([Cell(run.name), *cells, n, *(column[k] for column in columns)])
    if bound := protocols[0].get("bound"):
        facts = [("Bound", text.setting(bound))]
        return Table("Likelihood of validation images", head, body, facts, "", [_protocols(rows)])
    reference, extractor, floor = reference_of(records[0])
    facts = [("Reference", reference), ("Extractor", extractor), ("Real images (the floor)", floor)]
    shared = {f: p[f] for p in protocols for f in DRAWING if f not in varying and p.get(f) is not None}
    if shared:
        words = ", ".join(f"{DRAWING[f][0].lower()} {text.setting(value)}" for f, value in shared.items())
        facts.append(("All samples", words))
    note = "“real” is what real images score at the same N: a score at its floor is as good as real at this N."
    return Table(f"Against {reference}", head, body, facts, note, [_protocols(rows)])


def score_head(name: str) -> Head:
    """The head of a score's column."""
    known = metric(name)
    arrow, better = ("", "") if known is None else BETTER[known.lower]
    meaning = f"{name}: {known.meaning}{better}" if known else name
    return Head(f"{known.label if known else name}{arrow}", meaning, True)


def score_column(records: Sequence[Mapping[str, Any]], name: str, digits: int = 3) -> list[Cell]:
    """The cells of a score, with the decimals of the greatest to so many digits; the best is strong, if all have the
    same N."""
    values = [number(record["scores"].get(name)) for record in records]
    places = text.decimals([*values, *(floor_of(record, name) for record in records)], digits)
    finite = [v for v in values if v is not None]
    same = len({record["protocol"].get("num") for record in records}) == 1
    best = min(finite, key=lambda v: sign(name) * v) if sign(name) and same and len(finite) > 1 else None
    cells = [score_cell(record, name, places) for record in records]
    return [c._replace(strong=best is not None and v == best) for c, v in zip(cells, values, strict=True)]


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


def validation_tables(runs: Sequence[Run]) -> list[Table]:
    """Scores without records: those of validation images, and of the samples at the end of older runs."""
    tables = []
    for group in (VALIDATION, FINAL):
        rows = [(run, {n: v for n, v in run.validation.items() if group.holds(n)}) for run in runs]
        rows = [(run, scores) for run, scores in rows if score_names(scores)]
        names = score_names({name: value for _, scores in reversed(rows) for name, value in scores.items()})
        head = [Head("Run"), Head("N", "number of images", True), *(Head(_label(name), name, True) for name in names)]
        body = []
        for run, scores in rows:
            n = group.count(run)
            cells = [_plain_cell(scores, name) for name in names]
            body.append([Cell(run.name), Cell("not recorded" if n is None else text.figures(n)), *cells])
        if body:
            facts = [("Reference", group.reference), ("Extractor", group.extractor)]
            tables.append(Table(group.title, head, body, facts))
    return tables


class _Group(NamedTuple):
    """Scores without a protocol of their own, and what is known of it all the same."""

    title: str
    reference: str
    extractor: str
    holds: Callable[[str], bool]  # by name
    count: Callable[[Run], Any]  # N


def _of_validation(name: str) -> bool:
    return name.startswith(("val_", "rfd_", "rfid")) or name.endswith("_distance")


def validation_images(run: Run) -> int | None:
    """Of how many images a run's validation scores are; older versions said it of rFD only."""
    found = (number(run.validation.get(name)) for name in ("val_images", "rfd_images", "rfid_images"))
    return next((n for n in found if n is not None), None)


VALIDATION = _Group(
    "Validation",
    "the validation images",
    "as the score's name says; none where it names none",
    lambda name: _of_validation(name) and not name.endswith("_images"),
    validation_images,
)
FINAL = _Group(
    "Final samples",
    "the training images",
    "8x8 grey pixels",
    lambda name: not _of_validation(name),
    lambda run: number(run.config.get("sample", {}).get("num")),
)


def _label(name: str) -> str:
    known = metric(name)
    if not known:
        return name
    suffix = f" {name.removeprefix('rfd_')}" if name.startswith("rfd_") else ""
    return f"{known.label}{suffix}{BETTER[known.lower][0]}"


def _plain_cell(scores: Mapping[str, Any], name: str) -> Cell:
    value, floor = number(scores.get(name)), beside(scores, name, "real")
    if value is None or floor is None:
        return Cell(text.figures(value))
    return Cell(
        text.figures(value), (f"real {text.figures(floor)}",), "at floor" if at_floor(name, value, floor) else ""
    )
