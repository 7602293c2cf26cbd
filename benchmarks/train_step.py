"""How fast a training step is: ours, and diffusers' as it is and by torch.compile, in turns on the same device.

    python -m benchmarks.train_step --out=train_step.json      # 32x32 and 128x128 pixels, on a GPU
    python -m benchmarks.train_step --work=tiny --sides=ours   # a rehearsal on a CPU
    python -m benchmarks.train_step --work=a32 --profile=trace # and where the time of ours goes

A step is the loss and its gradient, clipping, AdamW and the moving average, in bfloat16 with float32 parameters, on
batches that are on the device already. MFU is the step's products and convolutions (`jaxdiff.training.flops`, the same
number for all sides) over what a chain of large matrix products reaches here. Medians of the rounds; --work=tiny, a32,
p128, adm128 or dit_xl2. diffusers: pip install -e ".[interop]"
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import harness, kernels, ours
from benchmarks.harness import Side, Work
from jaxdiff.build import compute_dtype
from jaxdiff.training.flops import matmul_peak, readable


def measure(args: argparse.Namespace, name: str, work: Work) -> dict[str, Any]:
    """The figures of a work, whose table is printed."""
    config = harness.work_config(work, args.batch, dtype=args.dtype)
    made: dict[str, ours.Training] = {}

    def build_ours() -> Side:
        made["ours"] = ours.training(work, config)
        return made["ours"].side

    def build_theirs(mode: str) -> Side:
        from benchmarks import theirs

        return theirs.training(work, config, made["ours"].params if made and not work.latents else None, mode)

    modes = {"eager": "", "compiled": args.compile_mode}
    builders: dict[str, Callable[[], Side]] = {"ours": build_ours}
    builders |= {side: functools.partial(build_theirs, mode) for side, mode in modes.items()}
    builders = {side: builders[side] for side in harness.SIDES if side in harness.choose_sides(args.sides)}
    peak = matmul_peak(compute_dtype(config))
    results = harness.take_turns(builders, args.rounds, args.steps_per_round)
    flops = made["ours"].flops if made else None
    record = {"batch": config.batch_size, "parameters": work.count, "peak_flops": peak, "flops": flops, **results}
    counted = f"{readable(flops / config.batch_size)}FLOP an image, " if flops else ""
    print(f"\n{name}, training, batch {config.batch_size}: {counted}peak {readable(peak)}FLOP/s\n")
    print(harness.markdown(harness.SPEED_COLUMNS, harness.speed_rows(results, config.batch_size, flops, peak)))
    if args.profile and made:
        side, count = made["ours"].side, results["ours"].get("steps_per_round", 3)
        record["kernels"] = kernels.profile(functools.partial(side.run, min(count, 10)), args.profile, min(count, 10))
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = harness.new_parser(__doc__)
    harness.add_turns(parser)
    args = parser.parse_args(argv)
    harness.each_work("train_step", argv, args, functools.partial(measure, args))


if __name__ == "__main__":
    main()
