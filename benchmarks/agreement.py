"""Whether training is the same with the fast forms of the networks as with the plain ones: loss curves of real steps.

    python -m benchmarks.agreement --config=configs/ddpm.py:digits --steps=500
    python -m benchmarks.agreement --config=configs/ddpm.py:cifar10 --steps=500 \\
        --set data.path=data/cifar10 --set lr=4e-4

Trains three times, each in a process of its own: as users do, with JAXDIFF_FORMS=plain, and as users do from another
seed, which tells how far apart curves are that need not agree. A difference is that of the mean losses of `--every`
steps, over the plain one; the table has the mean and the largest of them in each fifth of the run.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

from benchmarks.harness import markdown
from jaxdiff.config.files import write_json

RUNS = {"fast": ({}, 0), "plain": ({"JAXDIFF_FORMS": "plain"}, 0), "another seed": ({}, 1)}
PIECES = 5


def main(argv: Sequence[str] | None = None) -> None:
    """Train, compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/ddpm.py:digits")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=10, help="steps between losses of the log")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the config, for all")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the losses")
    args = parser.parse_args(argv)
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (variables, seed) in RUNS.items():
            workdir = pathlib.Path(folder) / name.replace(" ", "_")
            fields = {"epochs": 0.0, "steps": args.steps, "log_every": args.every, "seed": seed, "sample_every": 0}
            fields |= {"checkpoint_every": args.steps}
            flags = [f"--config.{field}={value}" for field, value in fields.items()]
            flags += [f"--config.{assignment}" for assignment in args.set]
            command = [sys.executable, "-m", "jaxdiff.main", f"--config={args.config}", f"--workdir={workdir}", *flags]
            subprocess.run(command, check=True, env=os.environ | variables, stdout=subprocess.DEVNULL)
            losses[name] = read_losses(workdir / "metrics.jsonl")
            print(f"{name}: {len(losses[name])} losses, the last {losses[name][-1]:.5f}", flush=True)
            if args.out:
                write_json(args.out, {"losses": losses, "every": args.every})
    print(f"\nDifference of the losses of {args.every} steps each, {args.config}\n")
    print(report(losses, args.every))


def read_losses(file: pathlib.Path) -> list[float]:
    """The training losses of a run in the order of its steps."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record and "grad_norm" in record]


def report(losses: dict[str, list[float]], every: int) -> str:
    """The table."""
    plain = np.array(losses["plain"])
    columns, rows = ["steps", "loss"], []
    apart = {name: np.abs(np.array(values) - plain) / plain for name, values in losses.items() if name != "plain"}
    columns += [f"{name}: {what}" for name in apart for what in ("mean", "largest")]
    for piece in np.array_split(np.arange(len(plain)), PIECES):
        cells = [f"{every * piece[0] + 1} to {every * (piece[-1] + 1)}", f"{plain[piece].mean():.5f}"]
        for values in apart.values():
            cells += [f"{values[piece].mean():.1e}", f"{values[piece].max():.1e}"]
        rows.append(cells)
    return markdown(columns, rows)


if __name__ == "__main__":
    main()
