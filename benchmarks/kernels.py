"""Where the device's time goes: the kernels of a trace by their kind, which their names tell."""

import collections
import gzip
import json
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from benchmarks.harness import markdown, one_line

# The first that is found in a kernel's name. XLA calls its own kernels loop_..., input_... and wrapped_...
KINDS = {
    "convolutions of ours": r"convolve_mosaic",
    "ours, by Pallas": r"pallas|mosaic|jaxdiff|group_?norm|sum_of_products",
    "attention": r"fmha|flash|sdpa|attention|dot_do_o|convert_dq",
    "copies": r"copy|transpose|concatenate|memcpy|memset|nchwto|nhwcto",
    "reductions": r"^(loop|input|wrapped|triton)\w*reduce(?!_precision)|row_reduc|column_reduc|softmax",
    "elementwise": r"^(loop|input|wrapped)_",
    "convolutions and matrix products": r"cudnn|cutlass|xmma|gem[mv]|nvjet|cublas|conv(?!ert)|[dw]grad|fprop|splitk",
    "elementwise, others": r"fusion|elementwise",
}
OTHER = "other"
LONGEST = 25  # kernels that are printed; four times as many are recorded


class Kernel(NamedTuple):
    """An execution of a kernel on the device."""

    name: str
    seconds: float


def kind_of(name: str) -> str:
    """The kind of a kernel, a name in `KINDS` or `OTHER`."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def read_profile(file: pathlib.Path) -> list[Kernel]:
    """The kernels of an .xplane.pb: what is on the streams of the planes of GPUs."""
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    lines = [line for plane in planes if "/device:GPU" in plane.name for line in plane.lines]
    return [Kernel(e.name, 1e-9 * e.duration_ns) for line in lines if "Stream" in line.name for e in line.events]


def read_trace(file: pathlib.Path) -> list[Kernel]:
    """The kernels of a .trace.json.gz, which holds the same, but a million events at most."""
    with gzip.open(file) as content:
        events = json.load(content)["traceEvents"]
    names: dict[tuple[str, Any, Any], str] = {}
    for e in events:
        if e.get("ph") == "M" and e.get("name") in ("process_name", "thread_name"):
            thread = e.get("tid") if e["name"] == "thread_name" else None
            names[e["name"], e["pid"], thread] = e["args"]["name"]

    def on_stream(e: dict[str, Any]) -> bool:
        process, thread = (
            names.get(("process_name", e["pid"], None), ""),
            names.get(("thread_name", e["pid"], e["tid"]), ""),
        )
        return "/device:GPU" in process and "Stream" in thread

    return [Kernel(e["name"], 1e-6 * e["dur"]) for e in events if e.get("ph") == "X" and "dur" in e and on_stream(e)]


READERS: dict[str, Callable[[pathlib.Path], list[Kernel]]] = {
    "*.xplane.pb": read_profile,
    "*.trace.json.gz": read_trace,
}


def read_kernels(folder: pathlib.Path) -> list[Kernel]:
    """The kernels of the newest trace in `folder`; none where there was no GPU."""
    for pattern, read in READERS.items():
        for file in sorted(folder.rglob(pattern), key=lambda file: file.stat().st_mtime)[-1:]:
            try:
                if found := read(file):
                    return found
            except Exception as error:  # its format is JAX's own
                print(f"{file.name}: {one_line(error)}", flush=True)
    return []


def summarise(kernels: Iterable[Kernel], steps: int) -> dict[str, Any]:
    """Seconds of a step by kind, and the longest kernels, [name, kind, seconds, executions] of a step each."""
    kinds: dict[str, float] = collections.defaultdict(float)
    names: dict[str, list[float]] = collections.defaultdict(list)
    for kernel in kernels:
        kinds[kind_of(kernel.name)] += kernel.seconds / steps
        names[kernel.name].append(kernel.seconds / steps)
    longest = sorted(names, key=lambda name: -sum(names[name]))[: 4 * LONGEST]
    by_kind = dict(sorted(kinds.items(), key=lambda item: -item[1]))
    return {
        "seconds": by_kind,
        "longest": [[name, kind_of(name), sum(names[name]), len(names[name]) / steps] for name in longest],
    }


def report(summary: dict[str, Any]) -> str:
    """Both tables."""
    total = sum(summary["seconds"].values())
    if not total:
        return "The trace has no kernels of a GPU."
    kinds = [[kind, f"{1e3 * s:.2f}", f"{100 * s / total:.1f}%"] for kind, s in summary["seconds"].items()]
    longest = [
        [f"`{name[:90]}`", kind, f"{1e3 * s:.3f}", f"{100 * s / total:.1f}%", f"{count:g}"]
        for name, kind, s, count in summary["longest"][:LONGEST]
    ]
    tables = [
        markdown(("kernels", "ms a step", "share"), [*kinds, ["all", f"{1e3 * total:.2f}", ""]]),
        markdown(("kernel", "kind", "ms a step", "share", "a step"), longest),
    ]
    return "\n\n".join(tables)


def profile(run: Callable[[], Any], folder: pathlib.Path, steps: int) -> dict[str, Any]:
    """Trace `run`, of so many steps, to `folder`; print where the time went, and return it as in `summarise`."""
    try:
        with jax.profiler.trace(str(folder)):
            run()
        summary = summarise(read_kernels(folder), steps)
    except Exception as error:  # the figures that are measured already are not lost for it
        print(f"no profile: {one_line(error)}", flush=True)
        return {"failed": one_line(error)}
    print(f"\nDevice time of ours, {steps} steps traced in {folder}:\n\n{report(summary)}", flush=True)
    return summary
