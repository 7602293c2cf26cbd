"""Memory and speed of a training step by batch and by what the backward pass computes again, and the largest batch.

    python -m benchmarks.memory --out=memory.json                                  # on a GPU
    python -m benchmarks.memory --work=adm128 --remat=none,blocks --largest
    python -m benchmarks.memory --work=tiny --sides=ours --batches=8,16            # a rehearsal on a CPU

Ours by each of `config.model.remat`, diffusers' by gradient checkpointing in the place of "blocks". Memory of ours is
what XLA plans for the step (arguments, which are the state, and temporary), of diffusers' the most that PyTorch's
allocator had. With --largest the memory of two batches is drawn out to that of the device, and the largest batch found
that way is trained on. Each side has a process of its own. Ours takes the card's memory at the start, 95 % of it: what
is taken piece by piece does not become one large piece again. Works and their parameters: benchmarks.train_step.
"""

import argparse
import functools
import gc
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # JAX's own is 0.75

import jax

from benchmarks import harness, ours
from benchmarks.harness import SIDES, Work
from jaxdiff.models.unet import REMAT

GIB = 2**30
MARGIN = 0.97  # of the device's memory: allocators do not fill it to the last byte
TRIES = 4  # batches that --largest trains on, each a sixteenth smaller than the one before
COLUMNS = ("", "remat", "batch", "state, GiB", "temporary, GiB", "ms", "images/s", "first, s")


class Step(NamedTuple):
    """What was measured of a step. Memory in bytes: of the state and the batch, and of all else, at its most."""

    state: int
    temporary: int
    seconds: float
    first_seconds: float


def measure_ours(work: Work, config: Any) -> Step:
    """jaxdiff's step."""
    begin = time.perf_counter()
    made = ours.training(work, config, keep_params=False)
    made.side.run(1)
    first = time.perf_counter() - begin
    return Step(made.memory["arguments"], made.memory["temp"], seconds_of(made.side.run), first)


def measure_theirs(mode: str, work: Work, config: Any) -> Step:
    """diffusers' step, as it is or by torch.compile."""
    import torch

    from benchmarks import theirs

    cuda = theirs.DEVICE == "cuda"
    if cuda:
        theirs.release()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    side = theirs.training(work, config, None, mode)
    side.run(1)
    first = time.perf_counter() - begin
    state = torch.cuda.memory_allocated() if cuda else 0
    seconds = seconds_of(side.run)
    return Step(state, (torch.cuda.max_memory_allocated() if cuda else 0) - state, seconds, first)


def seconds_of(run: Callable[[int], Any]) -> float:
    """Median seconds of a step in three rounds of five, after two steps."""
    run(2)

    def five() -> float:
        begin = time.perf_counter()
        run(5)
        return (time.perf_counter() - begin) / 5

    return statistics.median(five() for _ in range(3))


def capacity() -> int:
    """Bytes of the first device that a program may have; 0 where JAX does not know (a CPU)."""
    return int((jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0))


def extrapolate(steps: dict[int, Step], limit: float) -> int:
    """The batch, a multiple of 8, whose memory is `limit` bytes by a straight line through two batches or more."""
    (small, first), (large, last) = min(steps.items()), max(steps.items())
    totals = [step.state + step.temporary for step in (first, last)]
    each = (totals[1] - totals[0]) / (large - small)
    return max(0, int((limit - totals[0]) / each + small)) // 8 * 8


def measure(args: argparse.Namespace, argv: Sequence[str], name: str, work: Work) -> dict[str, Any]:
    """The figures of a work, whose table is printed."""
    work = harness.of_width(work, args.channels)
    modes = {"eager": "", "compiled": args.compile_mode}
    sides = harness.choose_sides(args.sides)
    if len(sides) > 1:
        record = join([one_side(argv, name, side) for side in sides])
        show(name, record)
        return record
    batches = [int(b) for b in args.batches.split(",")] if args.batches else [args.batch or work.batch]
    record: dict[str, Any] = {"parameters": work.count, "capacity": capacity(), "steps": []}
    for side in sides:
        one = measure_ours if side == "ours" else functools.partial(measure_theirs, modes[side])
        for remat in args.remat.split(","):
            if side != "ours" and remat == "dots":
                continue  # diffusers has no such policy
            done: dict[int, Step] = {}

            def attempt(batch: int, side: str = side, remat: str = remat, one: Any = one, done: Any = done) -> bool:
                entry: dict[str, Any] = {"side": side, "remat": remat, "batch": batch}
                try:
                    done[batch] = one(work, harness.work_config(work, batch, remat=remat, dtype=args.dtype))
                    entry |= done[batch]._asdict()
                except Exception as error:  # out of memory or whatever it is: the others go on
                    entry["failed"] = harness.one_line(error)
                record["steps"].append(entry)
                print(" | ".join(row(entry)), flush=True)
                gc.collect()
                return batch in done

            for batch in batches + ([2 * batches[0]] if args.largest and len(batches) == 1 else []):
                attempt(batch)
            if args.largest and len(done) > 1 and capacity():
                batch = extrapolate(done, MARGIN * capacity())
                for _ in range(TRIES):
                    if batch in done or batch < 8 or attempt(batch):
                        break
                    batch = batch * 15 // 16 // 8 * 8
    show(name, record)
    return record


def one_side(argv: Sequence[str], name: str, side: str) -> dict[str, Any]:
    """What `measure` returns of one side, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "one.json"
        flags = [f"--work={name}", f"--sides={side}", f"--out={file}"]  # the last ones count
        done = subprocess.run([sys.executable, "-m", "benchmarks.memory", *argv, *flags])
        if done.returncode:
            return {"steps": [{"side": side, "remat": "", "batch": "", "failed": f"exit status {done.returncode}"}]}
        return json.loads(file.read_text())["works"][name]


def join(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several sides as those of one work."""
    steps = [step for record in records for step in record["steps"]]
    return {**{key: value for record in records for key, value in record.items()}, "steps": steps}


def show(name: str, record: dict[str, Any]) -> None:
    """Print the table."""
    print(f"\n{name}, training, memory of the device {record.get('capacity', 0) / GIB:.1f} GiB\n")
    print(harness.markdown(COLUMNS, [row(entry) for entry in record["steps"]]))


def row(entry: dict[str, Any]) -> list[str]:
    """Its cells of the table."""
    cells = [SIDES[entry["side"]], entry["remat"], str(entry["batch"])]
    if "failed" in entry:
        return [*cells, f"failed: {entry['failed'][:120]}", "", "", "", ""]
    s = entry["seconds"]
    memory = [f"{entry[key] / GIB:.2f}" for key in ("state", "temporary")]
    return [*cells, *memory, f"{1e3 * s:.1f}", f"{entry['batch'] / s:,.1f}", f"{entry['first_seconds']:.0f}"]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = harness.new_parser(__doc__)
    parser.set_defaults(sides="ours,eager", work="p128,adm128,dit_xl2")
    harness.add_channels(parser)
    parser.add_argument("--remat", default="none,blocks", help=f"of {', '.join(REMAT)}; commas between")
    parser.add_argument("--batches", default="", help="images, commas between; default that of the work")
    parser.add_argument("--largest", action="store_true", help="find the largest batch as well")
    parser.set_defaults(profile=None)
    args = parser.parse_args(argv)
    if unknown := set(args.remat.split(",")) - set(REMAT):
        parser.error(f"--remat: {', '.join(sorted(unknown))}: must be of {', '.join(REMAT)}")
    if args.sides == "ours":
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"  # JAX's own, before anything asks for the devices
    harness.each_work("memory", argv, args, functools.partial(measure, args, sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
