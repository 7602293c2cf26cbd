"""RESULTS.md: the tables of a ladder in Markdown, from the files of its workdir."""

import pathlib
from collections.abc import Iterable

from jaxdiff.config import files
from jaxdiff.evaluation.records import Record, read_scores, without_companions
from jaxdiff.ladder import tables
from jaxdiff.ladder.rungs import read_ladder, rung_names
from jaxdiff.ladder.tables import NOT_YET, Filled, figure

FILE = "RESULTS.md"


def write_results(workdir: pathlib.Path) -> None:
    """Write the RESULTS.md of a ladder's workdir anew."""
    (workdir / FILE).write_text(results(workdir), encoding="utf-8")


def results(workdir: pathlib.Path) -> str:
    """The RESULTS.md of a ladder's workdir: what its files say, with "not yet" where they say nothing."""
    config, rungs = files.load(workdir / "config.json"), read_ladder(workdir)["rungs"]
    starts = files.read_jsonl(workdir / "starts.jsonl")
    scores = {name: read_scores(workdir / name) for name in rung_names(config)}
    told = [
        f"- {name}: " + (f"`{value}`" if name == "Command" else value)
        for name, value in tables.facts(config, rungs, starts)
    ]
    trained = tables.trainings(config, rungs, {name: s["validation"] for name, s in scores.items()})
    parts = [f"# {config.name}", "\n".join(told), "## Trainings", trained.note, _markdown(trained.head, trained.rows)]
    for filled in tables.fill(config, rungs, {name: s["records"] for name, s in scores.items()}):
        parts += [f"## {filled.table.title}", filled.table.compared, *_table(filled)]
    return "\n\n".join(parts) + "\n"


def _table(filled: Filled) -> list[str]:
    """What its numbers were measured with, and the table."""
    if not filled.protocols:
        return ["Not yet."]
    several = len(filled.protocols) > 1
    told, floors = [], []
    for words, lines in filled.protocols.items():
        labels, record = "; ".join(line.row.label for line in lines), lines[0].record
        assert record
        told.append(f"- {labels}: {'; '.join(words)}" if several else f"- {'; '.join(words)}")
        real = {name: own["real"] for name, own in without_companions(record["scores"]).items() if "real" in own}
        if floor := {**real, **record["floor"]}:
            of = f" ({labels})" if several else ""
            floors.append([f"real images: floor{of}", "", *(_score(name, floor) for name in filled.scores)])
    rows = []
    for line in filled.lines:
        if line.record is None:
            rows.append([line.row.label, NOT_YET])
            continue
        cells = [line.row.label, f"{line.record['protocol']['step']:,}"]
        cells += [*(_score(name, line.record["scores"]) for name in filled.scores), *_times(line.record)]
        if filled.table.speedup:
            cells.append("" if line.speedup is None else f"{line.speedup:.2f}")
        rows.append(cells)
    head = ["", "trained steps", *filled.scores, "sampling, s", "images/s", "compiling, s"]
    head += ["speed-up"] if filled.table.speedup else []
    return ["\n".join(told), _markdown(head, [*rows, *floors])]


def _times(record: Record) -> list[str]:
    sampling, num = record["seconds"]["sampling"], record["protocol"]["num"]
    return [f"{value:.3g}" for value in (sampling, num / sampling, record["seconds"]["compile"])]


def _score(name: str, scores: dict[str, float]) -> str:
    """A score with its interval or deviation, where there are such."""
    if name not in scores:
        return ""
    own = without_companions(scores)[name]
    text = figure(scores[name])
    if "low" in own and "high" in own:
        text += f" [{figure(own['low'])}, {figure(own['high'])}]"
    return text + (f" ± {figure(own['std'])}" if "std" in own else "")


def _markdown(heads: list[str], rows: Iterable[list[str]]) -> str:
    width = len(heads)
    lines = [heads, ["---"] * width, *([*row, *[""] * (width - len(row))] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
