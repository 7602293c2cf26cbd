"""How fast images are drawn: ours, and diffusers' network as it is and by torch.compile, in turns on a device.

    python -m benchmarks.sampling --out=sampling.json          # 32x32 and 128x128 pixels, on a GPU
    python -m benchmarks.sampling --work=tiny --sides=ours     # a rehearsal on a CPU

A batch by DDIM in 50 steps, in bfloat16, up to uint8 images on the host; without guidance, with random weights. Ours is
the `Generator` that --mode=sample calls, theirs a loop that waits for nothing on the way. MFU, works and --profile are
as in benchmarks.train_step; ms are of a batch.
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
    config.sample.steps = args.steps
    made = ours.sampling(work, config)

    def build_theirs(mode: str) -> Side:
        from benchmarks import theirs

        return theirs.sampling(work, config, made.params, mode)

    builders: dict[str, Callable[[], Side]] = {"ours": lambda: made.side}
    modes = {"eager": "", "compiled": args.compile_mode}
    builders |= {side: functools.partial(build_theirs, mode) for side, mode in modes.items()}
    builders = {side: builders[side] for side in harness.SIDES if side in harness.choose_sides(args.sides)}
    peak = matmul_peak(compute_dtype(config))
    results = harness.take_turns(builders, args.rounds, args.steps_per_round)
    batch = config.sample.num
    record = {"batch": batch, "steps": args.steps, "parameters": work.count, "peak_flops": peak, "flops": made.flops}
    print(f"\n{name}, DDIM-{args.steps}, batch {batch}: peak {readable(peak)}FLOP/s\n")
    print(harness.markdown(harness.SPEED_COLUMNS, harness.speed_rows(results, batch, made.flops, peak)))
    if args.profile:
        record["kernels"] = kernels.profile(functools.partial(made.side.run, 1), args.profile, 1)
    return record | results


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = harness.new_parser(__doc__)
    harness.add_turns(parser)
    parser.add_argument("--steps", type=int, default=50, help="of DDIM")
    args = parser.parse_args(argv)
    harness.each_work("sampling", argv, args, functools.partial(measure, args))


if __name__ == "__main__":
    main()
