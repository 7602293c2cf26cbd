"""Tables of the report, and those of times, configs and starts."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jaxdiff.config.files import flatten
from jaxdiff.report import text
from jaxdiff.report.reading import Run, mapping, number


class Cell(NamedTuple):
    """A cell of a table; each of `notes` stands small below, `mark` as a badge."""

    text: str
    notes: tuple[str, ...] = ()
    mark: str = ""
    code: bool = False
    strong: bool = False


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
                cells += [Cell(text.figures(n)), Cell(text.fixed(taken, 2)), Cell(text.figures(n and n / taken, 3))]
                cells += [Cell(text.fixed(seconds.get("compile"), 1)), Cell(str(record.get("device") or "–"))]
                entries.append(((sampler, *order), cells))
    names = ("Run", "Sampler", "Steps", "Guidance w", "N", "Sampling, s", "Images/s", "Compilation, s", "Device")
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
    body: list[list[Cell]] = []
    details: list[Table] = []
    starts: list[tuple[dict[str, Any], list[str]]] = []
    for line in run.starts:
        seconds = number(line.get("compile_seconds"))
        if seconds is None:
            starts.append((line, []))
        elif starts:  # it belongs to the start above it
            starts[-1][1].append(f"{line.get('stage', '')} {text.duration(seconds)}")
    for k, (start, compilations) in enumerate(starts, 1):
        compiled = "; ".join(compilations)
        cells = [Cell(text.moment(start.get("time", "–"))), Cell(str(start.get("mode", "–")))]
        cells += [Cell(str(start.get("command", "–")), code=True), Cell(str(start.get("device", "–")))]
        cells += [Cell(str(start.get("python", "–"))), Cell(compiled or "–")]
        body.append(cells)
        packages = [(str(name), str(version)) for name, version in mapping(start.get("packages")).items()]
        if packages and (not details or details[-1].facts != packages):
            details.append(Table(f"Packages from start {k} on", [], [], packages))
    head = [Head(name) for name in ("Time", "Mode", "Command", "Device", "Python", "Compilation")]
    return Table(run.name, head, body, details=details) if body else None
