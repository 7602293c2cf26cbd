"""What the benchmarks of speed and memory share: the works, turns on the clock, tables, and the file of figures."""

import argparse
import importlib.util
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else torch finds the card full

import jax
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from configs import ddpm
from jaxdiff.config.files import write_json
from jaxdiff.training.environment import ROOT, git_commit, installed

SIDES = {"ours": "jaxdiff", "eager": "diffusers", "compiled": "diffusers, torch.compile"}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "diffusers", "triton", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
DDPM = {"scale_shift_norm": False, "resblock_updown": False}


class Work(NamedTuple):
    """A network and what it is trained on.

    shape: [h, w, c] of an image, or with `latents` of a latent. batch: of training and sampling. model: config fields
    `model`. count: parameters. classes: of the data, 0 = unconditional.
    """

    shape: tuple[int, int, int]
    batch: int
    count: int
    model: dict[str, Any]
    classes: int = 0
    latents: bool = False


WORKS = {
    "a32": Work((32, 32, 3), 512, 35_746_307, {"channel_mult": (1, 2, 2, 2), "attention_resolutions": (16,), **DDPM}),
    "p128": Work((128, 128, 3), 64, 90_860_931, {"channel_mult": (1, 1, 2, 3, 4), **DDPM}),
    "adm128": Work(
        *((128, 128, 3), 16, 421_529_606),
        {
            **{"channels": 256, "channel_mult": (1, 1, 2, 3, 4), "attention_resolutions": (32, 16, 8)},
            **{"num_heads": 4, "learned_variance": True, "null_class": False},
        },
        classes=1000,
    ),
    "dit_xl2": Work(
        (32, 32, 4), 64, 674_834_720, {"name": "dit_xl2", "learned_variance": True}, classes=1000, latents=True
    ),
    "tiny": Work(
        *((8, 8, 3), 8, 0),
        {
            **{"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,)},
            **{"head_dim": 16, **DDPM},
        },
    ),
}


class Side(NamedTuple):
    """One of those that take turns. run: does so many steps, and returns when they are done; rest: after its turn."""

    run: Callable[[int], Any]
    rest: Callable[[], None] = lambda: None


def work_config(work: Work, batch: int = 0, *, remat: str = "none", dtype: str = "auto") -> ConfigDict:
    """The config of a work's training, by the recipe of configs/ddpm.py."""
    config = ddpm.get_config("folder")
    config.data.update(image_size=work.shape[0], flip=False)
    config.model.update({"conditional": work.classes > 0, "context_tokens": 0, "remat": remat, **work.model})
    config.diffusion.label_dropout = 0.1 if work.classes and config.model.null_class else 0.0
    config.update(dtype=dtype, batch_size=batch or work.batch, epochs=0.0, steps=100_000)
    config.sample.update(num=config.batch_size, batch_size=config.batch_size, sampler="ddim", steps=50)
    return config


def first_device() -> Mesh:
    """A mesh of one device: what is compared runs on one."""
    return jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])


def new_parser(description: str | None, *, sides: bool = True) -> argparse.ArgumentParser:
    """The options that all have; without `sides` those of one that runs nothing, of ours alone."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="a32,p128", help=f"of {', '.join(WORKS)}; commas between")
    parser.add_argument("--batch", type=int, default=0, help="images; default that of the work")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for all figures")
    if not sides:
        return parser
    parser.add_argument("--sides", default=",".join(SIDES), help="commas between; diffusers where it is installed")
    parser.add_argument(
        "--dtype", default="auto", help="of the computation: auto (bfloat16 on a GPU), bfloat16, float32"
    )
    parser.add_argument("--compile-mode", default="default", help="of torch.compile")
    return parser


def add_channels(parser: argparse.ArgumentParser) -> None:
    """The option of benchmarks of memory, which look for the largest model."""
    parser.add_argument("--channels", type=int, default=0, help="of the UNet's first level; default those of the work")


def of_width(work: Work, channels: int) -> Work:
    """The work with a UNet of so many channels, or as it is for 0."""
    return work._replace(count=0, model={**work.model, "channels": channels}) if channels else work


def add_turns(parser: argparse.ArgumentParser) -> None:
    """The options of benchmarks whose sides take turns."""
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps-per-round", type=int, default=0, help="0 = about a second of them")
    parser.add_argument("--profile", type=pathlib.Path, help="folder for a trace of a round of ours")


def choose_sides(asked: str) -> list[str]:
    """The sides that were asked for and can play here; says which cannot. Exits where there is no such side."""
    names = asked.split(",")
    if unknown := set(names) - set(SIDES):
        sys.exit(f"--sides: {', '.join(sorted(unknown))}: must be of {', '.join(SIDES)}")
    missing = [package for package in ("torch", "diffusers") if importlib.util.find_spec(package) is None]
    if missing and set(names) != {"ours"}:
        print(f"{' and '.join(missing)} not installed: ours alone", file=sys.stderr)
        names = [name for name in names if name == "ours"]
    return names


def choose_works(asked: str) -> list[str]:
    """The names of works that were asked for. Exits where there is no such work."""
    names = asked.split(",")
    if unknown := set(names) - set(WORKS):
        sys.exit(f"--work: {', '.join(sorted(unknown))}: must be of {', '.join(WORKS)}")
    return names


def one_line(error: BaseException) -> str:
    """An exception in at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def take_turns(
    builders: Mapping[str, Callable[[], Side]], rounds: int, steps: int = 0, seconds: float = 1.0
) -> dict[str, dict[str, Any]]:
    """Seconds a step of each side, whose rounds alternate: "seconds" [rounds], "steps_per_round", and "first_seconds"
    from its building to the end of its first step; or "failed", why there is nothing of this kind.

    Args: steps, of a round; 0 = as many as take `seconds`.
    """
    sides: dict[str, Side] = {}
    results: dict[str, dict[str, Any]] = {}

    def attempt(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # out of memory or whatever it is: the other sides go on
            results[name] = {"failed": one_line(error)}
            print(f"{name}: {results[name]['failed']}", file=sys.stderr, flush=True)
            sides.pop(name, None)

    def timed(side: Side, count: int) -> float:
        begin = time.perf_counter()
        side.run(count)
        return time.perf_counter() - begin

    def begin(name: str) -> None:
        start = time.perf_counter()
        side = builders[name]()
        side.run(1)
        first = time.perf_counter() - start
        side.run(2)
        count = steps or max(1, round(seconds / timed(side, 1)))
        side.rest()
        sides[name] = side
        results[name] = {"first_seconds": first, "steps_per_round": count, "seconds": []}
        print(f"{name}: first step after {first:.1f} s, {count} a round", file=sys.stderr, flush=True)

    def turn(name: str) -> None:
        side, result = sides[name], results[name]
        side.run(1)  # what its rest gave away comes back
        seconds = timed(side, result["steps_per_round"]) / result["steps_per_round"]
        result["seconds"].append(seconds)
        print(f"{name}: {1e3 * seconds:.2f} ms", file=sys.stderr, flush=True)  # not lost if the rest is
        side.rest()

    for name in builders:
        attempt(name, lambda name=name: begin(name))
    for _ in range(rounds):
        for name in tuple(sides):
            attempt(name, lambda name=name: turn(name))
    return results


def speed_rows(
    results: Mapping[str, Mapping[str, Any]], batch: int, flops: float | None, peak: float
) -> list[list[str]]:
    """Rows of the table of a work: side, ms a step, images/s with their range, MFU, how many times as fast ours is.

    Args: flops, of a step, the same for all sides; peak, FLOP/s.
    """
    medians = {name: statistics.median(r["seconds"]) for name, r in results.items() if r.get("seconds")}
    rows = []
    for name, result in results.items():
        if name not in medians:
            rows.append([SIDES[name], f"failed: {result['failed']}", "", "", "", "", ""])
            continue
        s, times = medians[name], result["seconds"]
        mfu = f"{100 * flops / s / peak:.1f}%" if flops else ""
        ratio = f"{s / medians['ours']:.2f}" if "ours" in medians else ""
        low, high = batch / max(times), batch / min(times)
        row = [f"{1e3 * s:.2f}", f"{batch / s:,.1f}", f"{low:,.1f} to {high:,.1f}", mfu, ratio]
        rows.append([SIDES[name], *row, f"{result['first_seconds']:.0f}"])
    return rows


SPEED_COLUMNS = ("", "ms", "images/s", "range", "MFU", "ours is x as fast", "first, s")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def environment() -> dict[str, Any]:
    """Versions, and the driver where nvidia-smi tells; JAX is not started by this."""
    record: dict[str, Any] = {"python": platform.python_version(), "command": shlex.join(["python", *_arguments()])}
    record["versions"] = {name: version for name in PACKAGES if (version := installed(name))}
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        record["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass  # none here
    if commit := git_commit(ROOT):
        record["git"] = commit
    return record


def _arguments() -> list[str]:
    script = pathlib.Path(sys.argv[0])
    return ["-m", f"benchmarks.{script.stem}"] + sys.argv[1:] if script.parent.name == "benchmarks" else sys.argv


def device() -> dict[str, str]:
    """The first device's name, and what JAX runs on."""
    backend = jax.extend.backend.get_backend()
    return {"device": jax.devices()[0].device_kind, "platform": " ".join(backend.platform_version.split())}


def each_work(
    name: str, argv: Sequence[str] | None, args: argparse.Namespace, measure: Callable[[str, Work], dict[str, Any]]
) -> dict[str, Any]:
    """The record of benchmark `name`, {..., "works": {work: what `measure` returns}}, which is written to --out.

    Of several works each has a process of its own, so that it finds the card empty.
    """
    record: dict[str, Any] = {"benchmark": name, **environment(), "works": {}}
    works = choose_works(args.work)
    for work in works:
        if len(works) == 1:
            record |= device()
            record["works"][work] = measure(work, WORKS[work])
        else:
            with tempfile.TemporaryDirectory() as folder:
                file = pathlib.Path(folder) / "one.json"
                flags = [f"--work={work}", f"--out={file}"]  # the last ones count
                if args.profile:
                    flags.append(f"--profile={args.profile / work}")
                done = subprocess.run(
                    [sys.executable, "-m", f"benchmarks.{name}", *(sys.argv[1:] if argv is None else argv), *flags]
                )
                inner = json.loads(file.read_text()) if file.exists() else {"works": {}}
            record |= {key: inner[key] for key in ("device", "platform") if key in inner}
            record["works"] |= inner["works"] or {work: {"failed": f"exit status {done.returncode}"}}
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, record)
    return record
