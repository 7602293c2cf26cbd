"""What XLA plans for a GPU, on a machine without one: memory of a training step, and its kernels.

    pip install "jax[cuda12]"
    python -m benchmarks.planned --work=p128 --remat=none,dots,blocks
    python -m benchmarks.planned --work=adm128,dit_xl2 --batches=16,32    # and the largest batch that fits
    python -m benchmarks.planned --work=p128 --channels=512 --batches=8   # a wider network

Compiled for an H100 80GB, ours alone. Nothing runs: convolutions and products are those that XLA takes untried, so that
their workspace may be another than on the card. Kernels are counted by their kinds, those of a loop (a DiT's blocks are
one) not. Works and their parameters: benchmarks.train_step.
"""

import argparse
import collections
import os
import re
import time
from collections.abc import Sequence
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # which asks the driver

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks import harness, ours
from benchmarks.harness import Work
from benchmarks.memory import GIB, MARGIN, Step, extrapolate
from jaxdiff import mesh as meshes
from jaxdiff.models import forms
from jaxdiff.models.layers import count_params
from jaxdiff.models.unet import REMAT
from jaxdiff.training.step import abstract_state

CAPABILITY, MEMORY = 9.0, 84_929_347_584
H100 = f"""
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: {MEMORY}
}}
"""
KINDS = {
    "ours": r"gpu\.triton|mosaic_gpu",
    "convolutions": r"cudnn\$conv",
    "attention": r"fmha",
    "products": r"cublas|gemm_fusion",
}
COLUMNS = ("", "remat", "batch", "state, GiB", "temporary, GiB", "kernels", "of these", "compiled in, s")


def new_mesh() -> Mesh:
    """A mesh of one H100, which is not there. Raises: NotImplementedError without JAX's plugin for CUDA."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    return topologies.make_mesh(topology, (1,), ("data",))


def compile_step(work: Work, config: Any, mesh: Mesh) -> jax.stages.Compiled:
    """The training step of `config`."""
    step, create = ours.step_and_init(work, config, ours.new_generator(work, config, mesh))
    split, arrays = meshes.batch_sharding(mesh), ours.draw_batch(work, config.batch_size, 0)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) for name, x in arrays.items()}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # which knows the card: kernels are lowered for it
        traced = step.trace(abstract_state(create, mesh), batch, ())
        return traced.lower(lowering_platforms=("cuda",)).compile()


def count_kernels(text: str) -> dict[str, int]:
    """Launches of a compiled program by kind, in a few lines of its text each; "others" are XLA's own."""
    entry = text[text.index("\nENTRY") :]
    lines = re.findall(r"^ +(?:ROOT )?%\S+ = .* (?:fusion|custom-call|copy)\(.*$", entry, re.MULTILINE)
    kinds = (next((kind for kind, pattern in KINDS.items() if re.search(pattern, line)), "others") for line in lines)
    return dict(collections.Counter(kinds))


def measure(args: argparse.Namespace, mesh: Mesh, name: str, work: Work) -> dict[str, Any]:
    """The plans of a work, whose rows are printed."""
    work = harness.of_width(work, args.channels)
    generator = ours.new_generator(work, harness.work_config(work, dtype="bfloat16"), mesh)
    parameters = count_params(generator.abstract_params())
    batches = [int(b) for b in args.batches.split(",")] if args.batches else [args.batch or work.batch]
    record: dict[str, Any] = {"parameters": parameters, "steps": []}
    for remat in args.remat.split(","):
        steps = {}
        for batch in batches:
            begin = time.perf_counter()
            compiled = compile_step(work, harness.work_config(work, batch, remat=remat, dtype="bfloat16"), mesh)
            memory, kernels = compiled.memory_analysis(), count_kernels(compiled.as_text())
            seconds = time.perf_counter() - begin
            state, temporary = int(memory.argument_size_in_bytes), int(memory.temp_size_in_bytes)
            steps[batch] = Step(state, temporary, np.nan, np.nan)
            sizes = [f"{b / GIB:.2f}" for b in (state, temporary)]
            counts = ", ".join(f"{n} {kind}" for kind, n in kernels.items())
            row = [
                f"{name}, {parameters / 1e6:,.1f} M",
                remat,
                str(batch),
                *sizes,
                str(sum(kernels.values())),
                counts,
                f"{seconds:.0f}",
            ]
            print(f"| {' | '.join(row)} |", flush=True)
            entry = {"remat": remat, "batch": batch, "state": state, "temporary": temporary, "kernels": kernels}
            record["steps"].append(entry)
        if len(steps) > 1:
            largest = extrapolate(steps, MARGIN * 0.95 * MEMORY)
            record[f"largest, {remat}"] = largest
            print(f"| {name} | {remat} | {largest:,} at most, by a straight line | | | | | |", flush=True)
    return record


def main(argv: Sequence[str] | None = None) -> None:
    """Compile and print."""
    parser = harness.new_parser(__doc__, sides=False)
    harness.add_channels(parser)
    parser.add_argument("--remat", default="none", help=f"of {', '.join(REMAT)}; commas between")
    parser.add_argument("--batches", default="", help="commas between; default --batch")
    args = parser.parse_args(argv)
    if unknown := set(args.remat.split(",")) - set(REMAT):
        parser.error(f"--remat: {', '.join(sorted(unknown))}: must be of {', '.join(REMAT)}")
    works = harness.choose_works(args.work)
    try:
        mesh = new_mesh()
    except NotImplementedError:
        parser.error('needs JAX\'s plugin for CUDA: pip install "jax[cuda12]"')
    forms.CAPABILITY = CAPABILITY
    print(harness.markdown(COLUMNS, []))
    record = {"benchmark": "planned", **harness.environment(), "device": "NVIDIA H100 80GB HBM3, planned for"}
    record["works"] = {name: measure(args, mesh, name, harness.WORKS[name]) for name in works}
    if args.out:
        harness.write_json(args.out, record)


if __name__ == "__main__":
    main()
