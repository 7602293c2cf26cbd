"""scores.json: the validation metrics of a workdir, and a record of every scoring with all that makes its numbers."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from jaxdiff.config import files

Record = dict[str, Any]  # scores, floor, protocol, seconds, device, pictures
FILE = "scores.json"
SHA256 = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{56}\b")
# kid_low_effnet_lite0 belongs to kid_effnet_lite0, knn_accuracy_real to knn_accuracy.
COMPANION = re.compile(r"(.+?)_(low|high|std|real)(_.+)?")


def read_scores(workdir: pathlib.Path) -> dict[str, Any]:
    """{"validation": {name: value}, "records": [record, ...]}; what earlier versions wrote is all validation."""
    path = workdir / FILE
    content = files.read_json(path) if path.exists() else {}
    if content and "records" not in content:
        content = {"validation": content}
    return {"validation": {}, "records": [], **content}


def write_validation(workdir: pathlib.Path, validation: dict[str, float], images: int) -> None:
    """Put down the validation metrics and, as "val_images", of how many images they are; the records stay."""
    with files.alone(workdir):
        files.write_json(workdir / FILE, {**read_scores(workdir), "validation": {**validation, "val_images": images}})


def add_record(workdir: pathlib.Path, record: Record) -> None:
    """Put down a record, in the place of one with the same protocol if there is such."""
    with files.alone(workdir):
        content = read_scores(workdir)
        others = [r for r in content["records"] if not is_of(r, record["protocol"])]
        files.write_json(workdir / FILE, {**content, "records": [*others, record]})


def is_of(record: Record, protocol: dict[str, Any]) -> bool:
    """Whether a record was measured with `protocol`; one that is older than the field "dtype" is of any."""
    return {"dtype": protocol.get("dtype"), **record["protocol"]} == {"dtype": None, **protocol}


def without_companions(scores: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{score: {"low", "high", "std", "real": what is recorded with it}}: bounds, deviation, value of real images."""
    own: dict[str, dict[str, Any]] = {}
    belonging = []
    for name, value in scores.items():
        match = COMPANION.fullmatch(name)
        if match and (base := match[1] + (match[3] or "")) in scores:
            belonging.append((base, match[2], value))
        else:
            own[name] = {}
    for base, word, value in belonging:
        own.setdefault(base, {})[word] = value
    return own


def _guided(protocol: Mapping[str, Any]) -> str:
    """How samples were guided."""
    words = [f"w = {protocol['guidance']:g}"]
    if interval := protocol.get("guidance_interval"):
        words.append(f"at t = {interval[0]:g} to {interval[1]:g}")
    if phi := protocol.get("guidance_rescale"):
        words.append(f"rescaled by {phi:g}")
    if weak := protocol.get("autoguidance"):
        words.append(f"by step {protocol['autoguidance_step']:,} of {weak}")
    return " ".join(words)


def describe(record: Record) -> str:
    """The scores, each with its floor, and in words what they were measured with: three lines."""
    floor, p = record["floor"], record["protocol"]

    def number(name: str, value: float) -> str:
        return f"{name} {value:.4g}" + (f" (floor {floor[name]:.4g})" if name in floor else "")

    scores = "  ".join(number(name, value) for name, value in record["scores"].items())
    of = f"{p['num']:,} {p['images']}"
    if p["images"] == "samples":
        of += f" of step {p['step']:,}, {p['sampler']} {p['steps']} steps {p['spacing']}, eta {p['eta']:g}"
        of += f", {_guided(p)}, {p['weights']} weights, seed {p['seed']}, labels {p['labels']}"
        of += f", {p['dtype']}" if "dtype" in p else ""
    if "bound" in p:
        of += f" at step {p['step']:,}, {p['weights']} weights: {p['bound']}; seed {p['seed']}"
    lines = [scores, f"  of {of}"]
    if "reference" in p:
        real, other, e = p["reference"], p["floor"], p["extractor"]
        lines.append(
            f"  against {real['num']:,} {real['name']} images ({real['sha256'][:8]}), floor: {other['num']:,} "
            f"{other['name']} images; {e['name']}: {e['weights']}, {e['resize']}"
        )
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in record["seconds"].items())
    said = "\n".join([*lines, f"  {seconds} on {record['device']}"])
    return SHA256.sub(r"\1...", said)
