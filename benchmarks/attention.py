"""Memory and time of attention's forms, and of a DiT whose blocks are computed again in the backward pass.

    python -m benchmarks.attention               # 1,024 and 4,096 positions, DiT-B/2 and XL/2 on 32x32x4, on a GPU
    python -m benchmarks.attention --positions=256 --networks=

Temporary memory is XLA's figure for the compiled program, gradients included; times are medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdiff.models import DiT
from jaxdiff.models.attention import attend
from jaxdiff.models.dit import DITS

FORMS = {"float32": (jnp.float32, 0), "256 at a time": (jnp.float32, 256), "64 at a time": (jnp.float32, 64)}
FORMS |= {"bfloat16, cuDNN where it applies": (jnp.bfloat16, 0)}


def measure(function: Callable[..., Any], *args: Any) -> tuple[float, float, Any]:
    """MiB of temporary memory, median seconds, and the result of a function."""
    compiled = jax.jit(function).lower(*args).compile()
    out = jax.block_until_ready(compiled(*args))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - begin)
    return compiled.memory_analysis().temp_size_in_bytes / 2**20, statistics.median(seconds), out


def compare_forms(n: int, batch: int = 8, heads: int = 4, size: int = 64) -> None:
    """Print memory, time, and the largest difference of gradients from those of the first form, where it has those."""
    first = None
    for name, (dtype, chunk) in FORMS.items():
        key = jax.random.key(0)
        draws = [jax.random.normal(jax.random.fold_in(key, i), (batch, n, heads, size)) for i in range(4)]
        *qkv, out = (x.astype(dtype) for x in draws)

        def gradients(out: Any, *qkv: Any, chunk: int = chunk) -> Any:
            return jax.vjp(lambda *arrays: attend(*arrays, chunk), *qkv)[1](out)

        with jax.default_matmul_precision("highest"):
            memory, seconds, grads = measure(gradients, out, *qkv)
        first = first or grads
        error = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(grads, first, strict=True))
        print(f"{n} positions, {name}: {memory:.0f} MiB, {1e3 * seconds:.2f} ms, error {error:.1e}", flush=True)


def compare_remat(name: str, batch: int) -> None:
    """Print memory and images/s of forward and backward pass of a DiT in bfloat16, by `model.remat`."""
    for remat in ("none", "dots", "blocks"):
        network = DiT(out_channels=4, num_classes=1000, dtype=jnp.bfloat16, remat=remat, **DITS[name])
        x, t = jax.random.normal(jax.random.key(0), (batch, 32, 32, 4)), jnp.full(batch, 500)
        params = jax.jit(network.init)(jax.random.key(1), x[:1], t[:1], t[:1])

        def loss(params: Any, network: DiT = network, x: Any = x, t: Any = t) -> Any:
            return jnp.square(network.apply(params, x, t, t) - x).mean()

        memory, seconds, _ = measure(jax.value_and_grad(loss), params)
        print(f"{name}, batch {batch}, remat {remat}: {memory:.0f} MiB, {batch / seconds:.0f} images/s", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", default="1024,4096")
    parser.add_argument("--networks", default="dit_b2:128,dit_xl2:32", help="NAME:BATCH, commas between")
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}; batch 8, 4 heads of 64; forward and backward pass")
    for n in filter(None, args.positions.split(",")):
        compare_forms(int(n))
    for name, batch in (entry.split(":") for entry in filter(None, args.networks.split(","))):
        compare_remat(name, int(batch))


if __name__ == "__main__":
    main()
