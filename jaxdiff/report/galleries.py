"""Pictures of the report: what is shown, and with which words."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxdiff import images
from jaxdiff.report import scores as scoring
from jaxdiff.report import text
from jaxdiff.report.pictures import Album, evenly, halves
from jaxdiff.report.reading import Run, class_names, mapping, number, read_arrays, read_json, training_pictures

FINAL = re.compile(r"final(-\d+)?")  # names of what a training draws at its end
DRAWN = 8  # grids of --mode=sample that are shown, the newest
STRIPS = 4  # images of a denoising strip
TIMES = 10  # timesteps of it
WEIGHTS = ("raw weights", "averaged weights (EMA)")


def training(runs: Sequence[Run], album: Album) -> list[dict[str, Any]]:
    """A slider for each run and stage: {"run", "stage", "frames": [{"step", "pictures": [(label, Picture), ...]}]}."""
    figures = []
    for run in runs:
        for stage, paths in training_pictures(run).items():
            title, frames = f"{run.name}, {stage}", []
            for step in album.frames(list(paths), f"grids of {title}"):
                try:
                    sheets = halves(paths[step])
                except (OSError, ValueError, SyntaxError):  # half written
                    album.unreadable += 1
                    continue
                labels = WEIGHTS if len(sheets) == 2 else ("raw | averaged weights (EMA)",)
                what = "Validation images and reconstructions" if stage == "autoencoder" else "Samples"
                pictures = [
                    (label, album.add(sheet, f"{what} of {run.name} at step {step:,}, {label}"))
                    for label, sheet in zip(labels, sheets, strict=True)
                ]
                if pictures := [(label, picture) for label, picture in pictures if picture]:
                    frames.append({"step": step, "pictures": pictures})
            if frames:
                figures.append({"run": run.name, "stage": stage, "frames": frames})
    return sorted(figures, key=lambda figure: figure["stage"], reverse=True)  # diffusion first, runs in their order


def drawn(runs: Sequence[Run], album: Album) -> list[dict[str, Any]]:
    """Grids of the end and of --mode=sample: {"title", "note", "picture"}."""
    figures = []
    for run in runs:
        folder = run.workdir / "samples"
        used = {str(name) for record in run.records for name in record["pictures"].values()}
        others = [p for p in folder.glob("step*.png") if f"samples/{p.name}" not in used]
        others = sorted(others, key=lambda p: p.stat().st_mtime)[-DRAWN:]
        for path in [*_finals(run, ".png")[:1], *others]:
            settings = mapping(read_json(path.with_suffix(".json")))
            title = f"{run.name}: final samples" if path.stem.startswith("final") else f"{run.name}: {path.stem}"
            note = text.drawn(settings)
            if number(settings.get("num")) is not None:
                note += f"; {settings['num']:,} images, seed {settings.get('seed', '–')}"
            if picture := album.add(path, f"Grid of {title}"):
                figures.append({"title": title, "note": note, "picture": picture})
    return figures


def maps(runs: Sequence[Run], album: Album) -> list[dict[str, Any]]:
    """Maps of guidance and steps: {"run", "variants": [{"label", "steps", "guidance", "note", "cells"}]}.

    A variant holds the records whose protocols differ in nothing else; cells are {"picture", "score", "floor", ...} by
    (guidance, steps).
    """
    found = []
    for run in runs:
        groups: dict[str, dict[tuple[float, int], dict[str, Any]]] = {}
        for record in run.records:
            protocol = record["protocol"]
            w, steps = number(protocol.get("guidance")), number(protocol.get("steps"))
            if w is not None and steps is not None and protocol.get("images", "samples") == "samples":
                rest = {k: v for k, v in protocol.items() if k not in ("guidance", "steps")}
                groups.setdefault(json.dumps(rest, sort_keys=True, default=str), {})[w, steps] = record
        groups = {key: cells for key, cells in groups.items() if len(cells) > 1}
        protocols = [json.loads(key) for key in groups]
        fields = dict.fromkeys(field for protocol in protocols for field in protocol)
        varying = [k for k in fields if any(p.get(k) != protocols[0].get(k) for p in protocols)]
        variants = []
        for protocol, cells in zip(protocols, groups.values(), strict=True):
            label = ", ".join(_word(k, protocol.get(k)) for k in varying) or "all"
            variants.append({"label": label, **_variant(run, cells, album)})
        if variants:
            found.append({"run": run.name, "variants": variants})
    return found


def _word(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("name")
    return f"{name} {text.setting(value)}"


def _variant(run: Run, cells: Mapping[tuple[float, int], dict[str, Any]], album: Album) -> dict[str, Any]:
    every = list(cells.values())
    names = scoring.score_names({name: value for record in every for name, value in record["scores"].items()})
    name = names[0]
    known = scoring.metric(name)
    values = {at: v for at, r in cells.items() if (v := number(r["scores"].get(name))) is not None}
    best = min(values, key=lambda at: scoring.sign(name) * values[at]) if scoring.sign(name) else None
    places = text.decimals(values.values(), 3)
    shown = {}
    for at, record in cells.items():
        cell = scoring.score_cell(record, name, places)
        where = f"w = {text.setting(float(at[0]))}, {at[1]} steps"
        path = record["pictures"].get("samples")
        picture = album.add(run.workdir / path, f"Samples of {run.name}, {where}") if isinstance(path, str) else None
        lines = [
            f"{n}: {text.figures(record['scores'][n])}" for n in names if number(record["scores"].get(n)) is not None
        ]
        caption = f"{run.name}, {where}. {'; '.join(lines)}. {scoring.terse(record)}."
        shown[at] = {"picture": picture, "cell": cell, "best": at == best, "caption": caption, "where": where}
    label = known.label if known else name
    direction = {1: ", lower is better", -1: ", higher is better", 0: ""}[scoring.sign(name)]
    outlined = "" if best is None else "; outlined: the best"
    note = f"Below each grid: {label}{direction}, {scoring.terse(every[0])}{outlined}."
    return {
        "guidance": sorted({w for w, _ in cells}),
        "steps": sorted({steps for _, steps in cells}),
        "note": note,
        "cells": shown,
        "score": label,
    }


def _finals(run: Run, suffix: str) -> list[pathlib.Path]:
    """The samples that a training drew at its end, those of its last start first."""
    found = [p for p in (run.workdir / "samples").glob(f"final*{suffix}") if FINAL.fullmatch(p.stem)]
    return sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)


def _samples(run: Run) -> tuple[UInt8[np.ndarray, "n h w 3"], np.ndarray, str] | None:
    """Images and labels of a run: the final ones, or the newest that were drawn; and the name of the file."""
    folder = run.workdir / "samples"
    others = sorted(folder.glob("step*.npz"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in (*_finals(run, ".npz"), *others):
        arrays = read_arrays(path, "arr_0", "arr_1")
        if arrays and _pixels(arrays["arr_0"]) and len(arrays["arr_1"]) == len(arrays["arr_0"]):
            return arrays["arr_0"], arrays["arr_1"], path.name
    return None


def _pixels(array: np.ndarray) -> bool:
    return array.ndim == 4 and array.dtype == np.uint8 and array.shape[-1] == 3 and len(array) > 0


def classes(runs: Sequence[Run], album: Album) -> list[dict[str, Any]]:
    """A browser for each data set: {"classes": [{"name", "sheets": [(title, Picture), ...]}]}; runs of the same classes
    share one, and the real images."""
    groups: dict[tuple[tuple[str, ...], int], list[Run]] = {}
    for run in runs:
        if run.own and _samples(run):
            groups.setdefault((tuple(class_names(run)), run.config.data.image_size), []).append(run)
    browsers = []
    for (names, _), members in groups.items():
        sets: list[tuple[str, np.ndarray, np.ndarray]] = []
        for run in members:
            real = read_arrays(run.workdir / "samples" / "real.npz", "arr_0", "arr_1")
            if real and _pixels(real["arr_0"]) and not sets:
                sets.append(("real images", real["arr_0"], real["arr_1"]))
        for run in members:
            found = _samples(run)
            assert found
            sets.append((f"{run.name}, {found[2]}", *found[:2]))
        labels = sorted({int(label) for _, _, these in sets for label in np.unique(these)})
        entries = []
        for label in labels:
            name = names[label] if 0 <= label < len(names) else str(label)
            sheets = []
            for title, pixels, these in sets:
                own = pixels[these == label][: album.level.each]
                if len(own) and (picture := album.add(_sheet(own), f"{title}: class {name}")):
                    sheets.append((title, picture))
            if sheets:
                entries.append({"name": name, "sheets": sheets})
        if entries:
            browsers.append({"title": ", ".join(run.name for run in members), "classes": entries})
    return browsers


def _sheet(pixels: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
    return images.grid(pixels, columns=-(-len(pixels) // 2) if len(pixels) > 5 else len(pixels))


def denoising(runs: Sequence[Run], album: Album) -> list[dict[str, Any]]:
    """Strips of x_t and the predicted x_0: {"run", "times", "rows": [{"label", "pictures"}]}."""
    strips = []
    for run in runs:
        arrays = read_arrays(run.workdir / "samples" / "denoising.npz", "t", "x_t", "x0")
        if not arrays or arrays["x_t"].ndim != 5 or arrays["x_t"].shape != arrays["x0"].shape:
            continue
        t, names = arrays["t"], class_names(run)
        if not len(t) or len(t) != len(arrays["x_t"]):
            continue
        chosen = evenly(range(len(t)), TIMES)
        labels = arrays.get("labels")
        rows = []
        for k in range(min(STRIPS, arrays["x_t"].shape[1])):
            label = int(labels[k]) if labels is not None and k < len(labels) else None
            name = f"image {k + 1}" if label is None else f"class {names[label] if 0 <= label < len(names) else label}"
            pair = [
                album.add(
                    images.grid(arrays[key][chosen, k], len(chosen)),
                    f"{what} of {run.name}, {name}, at t = {t[0]} to {t[-1]}",
                )
                for key, what in (("x_t", "Noisy images"), ("x0", "Predicted clean images"))
            ]
            if all(pair):
                rows.append({"label": name, "pictures": pair})
        if rows:
            strips.append({"run": run.name, "times": [text.figures(t[c].item()) for c in chosen], "rows": rows})
    return strips


def neighbours(runs: Sequence[Run], album: Album) -> list[dict[str, Any]]:
    """Pictures of nearest training images, of records and of samples/neighbours.png: {"title", "note", "picture"}."""
    figures = []
    for run in runs:
        named: dict[str, str] = {}
        for record in run.records:
            if isinstance(path := record["pictures"].get("neighbours"), str):
                named[path] = scoring.whose(run, record)
        if "samples/neighbours.png" not in named and (run.workdir / "samples" / "neighbours.png").exists():
            named["samples/neighbours.png"] = ""
        for path, note in album.frames(list(named.items()), f"neighbours of {run.name}"):
            if picture := album.add(run.workdir / path, f"Samples of {run.name} and the nearest training images"):
                figures.append({"title": run.name, "note": note, "picture": picture})
    return figures
