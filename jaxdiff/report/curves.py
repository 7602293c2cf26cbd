"""Curves of metrics.jsonl: read, smoothed, thinned, and as charts of Bokeh."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxdiff.report.reading import STAGES, Run, number

POINTS = 1500  # of one curve
ALL_POINTS = 120_000  # of all curves together, which then have fewer each
SMOOTHED = 20  # points from which on a curve is smoothed
# Numbers of metrics.jsonl that are shown first, with a title and a unit; then every val_*; the others are folded.
MAIN = {
    "loss": ("Training loss", ""),
    "grad_norm": ("Gradient norm", "before clipping"),
    "images_per_second": ("Speed", "images/s"),
    "mfu": ("Utilisation (MFU)", "share of the device's peak FLOP/s"),
}
VALIDATION = {
    "val_loss": ("Validation loss", ""),
    "val_psnr": ("Validation PSNR", "dB"),
    "val_ssim": ("Validation SSIM", ""),
}
SKIPPED = ("step", "stage", "images", "step_time")  # step_time says what images_per_second does
# Legible on white and on black; a ninth run begins anew, dashed.
COLOURS = ("#2f7de1", "#d9622b", "#1f9a6d", "#b657c9", "#b98300", "#e0487f", "#0f9bb0", "#8a7a5c")
# Bokeh puts what is between @ or $ and the next space there, escaped. Its box is light in dark pages, too.
TOOLTIP = """<div style="color: #1d1f23; font: 13px system-ui, sans-serif"><b>$name</b><br>@value{%.5g}
at step @step{0,0}<br>smoothed @line{%.5g}<br>@images{0,0} images</div>"""
DASHES = ("solid", "dashed", "dotted")


class Series(NamedTuple):
    """One number of one run; NaN where it was not finite."""

    run: Run
    step: Int[np.ndarray, " n"]
    images: Float[np.ndarray, " n"]  # seen so far
    value: Float[np.ndarray, " n"]


class Chart(NamedTuple):
    """A chart for the template."""

    key: str
    name: str  # in metrics.jsonl
    title: str
    unit: str
    rows: list[dict[str, Any]]  # of the table of numbers
    gaps: int  # values that were not finite
    item: dict[str, Any]  # JSON of Bokeh


class Stage(NamedTuple):
    """The numbers of a stage: charts shown first, others, and what has one value only: (name, run, value, step)."""

    name: str
    main: list[Chart]
    others: list[Chart]
    single: list[tuple[str, str, float, int]]


def read_series(run: Run, stage: str, name: str) -> Series | None:
    """The number `name` of a stage of a run, None where no line has it."""
    lines = [line for line in run.lines if line.get("stage", run.stage) == stage and name in line]
    if not any(number(line[name]) is not None for line in lines):
        return None
    values = [math.nan if (v := number(line[name])) is None else v for line in lines]
    images = [math.nan if (v := number(line.get("images"))) is None else v for line in lines]
    return Series(run, np.array([line["step"] for line in lines]), np.array(images, float), np.array(values, float))


def smooth(values: Float[np.ndarray, " n"], span: float) -> Float[np.ndarray, " n"]:
    """Average over about `span` values around each that are finite, without the lag of one over those before it.

    y_k = sum_j d^|k-j| x_j / sum_j d^|k-j|, with d = 1 - 2 / (span + 1). NaN where there is nothing to average.
    """
    decay, finite = 1 - 2 / (span + 1), np.isfinite(values)
    parts = np.stack([np.where(finite, values, 0), finite.astype(float)])

    def before(parts: Float[np.ndarray, "2 n"]) -> Float[np.ndarray, "2 n"]:
        sums = itertools.accumulate(parts.T.tolist(), lambda a, b: [a[0] * decay + b[0], a[1] * decay + b[1]])
        return np.array(list(sums)).reshape(-1, 2).T

    total, weight = before(parts) + before(parts[:, ::-1])[:, ::-1] - parts
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1), math.nan)


def thin(values: Float[np.ndarray, " n"], most: int) -> Int[np.ndarray, " m"]:
    """Increasing indices, at most `most` (4 or more): the first, the last, and the least and the greatest finite value
    of each of (most - 2) / 2 parts."""
    n = len(values)
    if n <= most:
        return np.arange(n)
    kept = {0, n - 1}
    for part in np.array_split(np.arange(n), (most - 2) // 2):
        finite = part[np.isfinite(values[part])]
        kept |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])} if len(finite) else set()
    return np.array(sorted(kept))


def logarithmic(series: Sequence[Series]) -> bool:
    """Whether a log axis shows more: all finite values positive, the greatest more than 20 times the least."""
    values = np.concatenate([s.value[np.isfinite(s.value)] for s in series])
    return bool(len(values)) and values.min() > 0 and values.max() > 20 * values.min()


def log_ticks(series: Sequence[Series]) -> list[float]:
    """Ticks of a log axis: 1, 2 and 5 times the powers of ten, these alone where there are many."""
    values = np.concatenate([s.value[np.isfinite(s.value)] for s in series])
    low, high = math.floor(math.log10(values.min())), math.ceil(math.log10(values.max()))
    digits, apart = ((1, 2, 5), 1) if high - low <= 2 else ((1,), -(-(high - low) // 6))
    return [float(f"{digit}e{power}") for power in range(low, high + 1, apart) for digit in digits]


def names_of(runs: Sequence[Run], stage: str) -> tuple[list[str], list[str]]:
    """Names of the numbers of a stage: those shown first, and the others."""
    found: dict[str, None] = {}
    for run in runs:
        for line in run.lines:
            if line.get("stage", run.stage) == stage:
                found |= dict.fromkeys(name for name, value in line.items() if number(value) is not None)
    names = [name for name in found if name not in SKIPPED]
    validation = [name for name in VALIDATION if name in names]
    validation += sorted(name for name in names if name.startswith("val_") and name not in VALIDATION)
    main = [name for name in ("loss", "grad_norm") if name in names] + validation
    main += [name for name in MAIN if name in names and name not in main]
    return main, sorted(set(names) - set(main))


def read_stages(runs: Sequence[Run]) -> list[Stage]:
    """The curves of all runs, overlaid, for each stage that one of them has."""
    named = {stage: names_of(runs, stage) for stage in STAGES}
    count = sum(len(main) + len(others) for main, others in named.values()) * len(runs)
    points = max(100, min(POINTS, ALL_POINTS // max(count, 1)))
    stages = []
    for stage, groups in named.items():
        charts: list[list[Chart]] = [[], []]
        single = []
        for names, made in zip(groups, charts, strict=True):
            for name in names:
                series = [s for run in runs if (s := read_series(run, stage, name))]
                if any(len(s.value) > 1 for s in series):
                    made.append(_chart(stage, name, series, runs, points))
                else:
                    single += [(name, s.run.name, float(s.value[0]), int(s.step[0])) for s in series]
        if any(groups):
            stages.append(Stage(stage, charts[0], charts[1], single))
    return stages


def owners(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """{owner: (colour, dash)} of the curves of each run that was asked for; its autoencoder has the same."""
    names = list(dict.fromkeys(run.owner for run in runs))
    styles = [(COLOURS[k % len(COLOURS)], DASHES[k // len(COLOURS) % len(DASHES)]) for k in range(len(names))]
    return dict(zip(names, styles, strict=True))


def _chart(stage: str, name: str, series: list[Series], runs: Sequence[Run], points: int) -> Chart:
    from bokeh.embed import json_item
    from bokeh.models import BasicTicker, ColumnDataSource, FixedTicker, HoverTool, NumeralTickFormatter
    from bokeh.plotting import figure

    key, (title, unit) = f"{stage}-{name}", {**MAIN, **VALIDATION}.get(name, (name, ""))
    styles = owners(runs)
    plot = figure(
        name=key,
        height=260,
        sizing_mode="stretch_width",
        y_axis_type="log" if logarithmic(series) else "linear",
        x_axis_label="step",
        tools="pan,box_zoom,wheel_zoom,reset,save",
        active_drag=None,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        output_backend="canvas",
        lod_threshold=None,
    )
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    plot.xaxis.ticker = BasicTicker(desired_num_ticks=5)
    if logarithmic(series):
        ticks = log_ticks(series)
        plot.yaxis.ticker = FixedTicker(ticks=ticks)
        plot.yaxis.major_label_overrides = {tick: f"{tick:,.0f}" if tick >= 1000 else f"{tick:g}" for tick in ticks}
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    drawn: list[Any]
    hovered: list[Any] = []
    for s in series:
        colour, dash = styles[s.run.owner]
        many = len(s.value) >= SMOOTHED and not name.startswith("val_")
        line = smooth(s.value, span(len(s.value))) if many else s.value
        rows = thin(s.value, points)
        data = {"step": s.step[rows].astype(np.int32), "images": s.images[rows]}
        data |= {"value": s.value[rows].astype(np.float32), "line": line[rows].astype(np.float32)}
        source = ColumnDataSource(data)
        shared: dict[str, Any] = dict(source=source, name=s.run.name, color=colour)
        drawn = [plot.line("step", "line", line_width=2, line_dash=dash, **shared)]
        hovered += drawn
        if many:
            drawn.append(plot.line("step", "value", line_width=1, line_alpha=0.3, **shared))
        if len(rows) < SMOOTHED:
            drawn.append(plot.scatter("step", "value", size=6, **shared))
        for renderer in drawn:
            renderer.tags = [s.run.owner]
    formatters: Any = {"@value": "printf", "@line": "printf"}
    plot.add_tools(HoverTool(renderers=hovered, mode="vline", tooltips=TOOLTIP, formatters=formatters))
    rows_of = [_row(s) for s in series]
    gaps = sum(int((~np.isfinite(s.value)).sum()) for s in series)
    return Chart(key, name, title, unit, rows_of, gaps, dict(json_item(plot)))


def span(count: int) -> int:
    """Values over which a curve of `count` is smoothed."""
    return max(5, count // 60)


def _row(s: Series) -> dict[str, Any]:
    finite = np.flatnonzero(np.isfinite(s.value))
    low, high = finite[s.value[finite].argmin()], finite[s.value[finite].argmax()]
    found = {"first": finite[0], "lowest": low, "highest": high, "last": finite[-1]}
    numbers = {word: (float(s.value[k]), int(s.step[k])) for word, k in found.items()}
    return {"run": s.run.name, "points": len(s.value), **numbers}
