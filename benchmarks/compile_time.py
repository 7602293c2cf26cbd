"""What a start of training waits for: each part with an empty cache of compiled programs, and again with a full one.

    python -m benchmarks.compile_time                                # a32 and p128, on a GPU
    python -m benchmarks.compile_time --work=tiny --sides=ours --out=compile_time.json

Every start is a process of its own, the caches are temporary folders. `parts` do one thing after the other; `ours`
compiles the step beside the rest, or finds that of the start before, as training does; `compiled` is diffusers' UNet
under torch.compile, with AdamW, where torch and diffusers are installed. Images are noise: what is measured does not
depend on them. "first step" is from the process's start, Python's own included, to the end of the first training step.
"""

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

DDPM = {"context_tokens": 0, "conditional": False, "scale_shift_norm": False, "resblock_updown": False}
# By name: side of the images, batch, and config fields `model` beside those of configs/ddpm.py.
WORKS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "a32": (32, 512, {"channel_mult": (1, 2, 2, 2), "attention_resolutions": (16,), **DDPM}),
    "p128": (128, 64, {"channel_mult": (1, 1, 2, 3, 4), "attention_resolutions": (16, 8), **DDPM}),
    "tiny": (
        *(8, 8),
        {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,), **DDPM},
    ),
}
SIDES = ("ours", "parts", "compiled")
PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "triton")


class Clock:
    """Seconds by the name of what took them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin


def start_jax(work: str, beside: bool) -> tuple[dict[str, float], Callable[[], None]]:
    """The parts of one start of our training, and what waits until all is in the caches; with `beside` the step is
    compiled beside them, or found."""
    clock = Clock()
    size, batch_size, model = WORKS[work]
    with clock("imports"):
        import jax
        import numpy as np

        from configs import ddpm
        from jaxdiff import mesh as meshes
        from jaxdiff.build import build_network, build_process
        from jaxdiff.keys import named_key
        from jaxdiff.training.compiling import Compiling
        from jaxdiff.training.experiments import build_recipe
        from jaxdiff.training.objectives import diffusion_objective
        from jaxdiff.training.optimizer import recipe_optimizer
        from jaxdiff.training.stages import run_train  # noqa: F401  # what it imports, training imports
        from jaxdiff.training.step import abstract_state, make_init, make_train_step
    with clock("devices"):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
        config = ddpm.get_config("folder")
        config.model.update(model)
        config.diffusion.label_dropout = 0.0
        network = build_network(config, 3, 0)
        objective = diffusion_objective(network, build_process(config), build_recipe(config), null_label=0)
        optimizer, schedule = recipe_optimizer(config, 1000)
        step = make_train_step(objective, optimizer, schedule, mesh, seed=0, ema_decay=config.ema_decay)
        example = np.zeros((1, size, size, 3), np.float32), np.zeros(1, np.int32)
        create = make_init(lambda key: network.init(key, *example, example[1]), optimizer, mesh)
        key = named_key(0, "init")
    with clock("init, traced"):
        state = abstract_state(create, mesh)
    image = np.random.default_rng(0).integers(0, 256, (batch_size, size, size, 3), np.uint8)
    batch = meshes.put_batch({"image": image, "label": np.zeros(batch_size, np.int32)}, mesh)
    compiling = None
    if beside:
        with clock("step, traced and lowered, or found"):
            compiling = Compiling(step, state, batch, ())
    with clock("init, lowered"):
        lowered_init = create.trace(key).lower()
    with clock("init, compiled"):
        initialise = lowered_init.compile()
    with clock("init, run"):
        state = jax.block_until_ready(initialise(key))
    if compiling is None:
        with clock("step, traced and lowered"):
            lowered = step.trace(state, batch, ()).lower()
    with clock("step, waited for" if compiling else "step, compiled"):
        compiled = compiling.result()[0] if compiling else lowered.compile()
    with clock("step, run"):
        jax.block_until_ready(compiled(state, batch, ()))
    return clock.seconds, compiling.kept.result if compiling else lambda: None


def start_torch(work: str) -> tuple[dict[str, float], Callable[[], None]]:
    """The parts of one start of diffusers' UNet of the same size under torch.compile, and nothing to wait for."""
    clock = Clock()
    size, batch_size, model = WORKS[work]
    with clock("imports"):
        import diffusers
        import torch
    gpu = torch.cuda.is_available()
    with clock("devices"):
        torch.zeros(1, device="cuda" if gpu else "cpu")
    with clock("init, run"):
        widths = [round(model.get("channels", 128) * m) for m in model["channel_mult"]]
        attended = [size >> i in model["attention_resolutions"] for i in range(len(widths))]
        network = diffusers.UNet2DModel(
            sample_size=size,
            block_out_channels=widths,
            layers_per_block=model.get("num_res_blocks", 2),
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attended],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)],
            attention_head_dim=min(64, widths[0]),
        ).to("cuda" if gpu else "cpu")
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=gpu)
    network = torch.compile(network)

    def loss(x: Any, noise: Any, t: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            return torch.nn.functional.mse_loss(network(x, t).sample.float(), noise)

    with clock("step, compiled"):  # and run: torch compiles at the first call
        x = torch.randn(batch_size, 3, size, size, device="cuda" if gpu else "cpu")
        loss(x, torch.randn_like(x), torch.randint(0, 1000, (batch_size,), device=x.device)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if gpu:
            torch.cuda.synchronize()
    return clock.seconds, lambda: None


CHILDREN = {
    "ours": functools.partial(start_jax, beside=True),
    "parts": functools.partial(start_jax, beside=False),
    "compiled": start_torch,
}


def one_start(work: str, side: str, cache: pathlib.Path) -> dict[str, Any]:
    """The parts of a start in a fresh process whose caches are in `cache`, and "first step"; or "failed"."""
    folders = {"JAX_COMPILATION_CACHE_DIR": "xla", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    environment = {**os.environ, **{name: str(cache / folder) for name, folder in folders.items()}}
    begin = time.time()
    words = [sys.executable, "-m", "benchmarks.compile_time", f"--child={side}", f"--work={work}"]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": f"exit status {done.returncode}"}
    *_, line = done.stdout.splitlines()
    record = json.loads(line)
    return {**record["seconds"], "first step": record["end"] - begin}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for every part, a column for every start."""
    parts = list(dict.fromkeys(part for result in results.values() for part in result if part != "first step"))
    rows = [["seconds", *results], ["---"] * (len(results) + 1)]
    for part in [*parts, "first step"]:
        cells = (result.get(part, "") for result in results.values())
        rows.append([part, *(f"{cell:.1f}" if isinstance(cell, float) else cell for cell in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def versions() -> dict[str, str]:
    """Of the packages that there are."""
    from jaxdiff.training.environment import installed

    return {"python": platform.python_version(), **{name: v for name in PACKAGES if (v := installed(name))}}


def chosen(flag: str, asked: str, known: Any) -> list[str]:
    """The names asked for. Exits where one is not known."""
    if unknown := [name for name in asked.split(",") if name not in known]:
        sys.exit(f"--{flag}={unknown[0]}: must be of {', '.join(known)}")
    return asked.split(",")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="a32,p128", help=f"of {', '.join(WORKS)}; commas between")
    parser.add_argument("--sides", default=",".join(SIDES), help="commas between")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for all figures")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    works, sides = chosen("work", args.work, WORKS), chosen("sides", args.sides, SIDES)
    if args.child:
        seconds, wait = CHILDREN[args.child](works[0])
        end = time.time()
        wait()
        print(json.dumps({"seconds": seconds, "end": end}), flush=True)
        os._exit(0)  # what torch and JAX do when they end is not waited for
    if "compiled" in sides and not all(importlib.util.find_spec(name) for name in ("torch", "diffusers")):
        print("torch and diffusers are not both installed: without the side compiled", file=sys.stderr)
        sides.remove("compiled")
    record: dict[str, Any] = {"benchmark": "compile_time", "versions": versions(), "works": {}}
    for work in works:
        results = record["works"][work] = {}
        for side in sides:
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    results[f"{side}, {state}"] = one_start(work, side, pathlib.Path(cache))
        for name, result in results.items():
            if "failed" in result:
                print(f"{work}, {name}: {result['failed']}", file=sys.stderr)
        print(f"\n{work}\n\n{table(results)}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
