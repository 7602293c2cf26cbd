"""What all kernels of our own go through: where the batch is split over devices each has its own images."""

import contextlib
import itertools
import pathlib
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

SOURCE = zlib.crc32(pathlib.Path(__file__).read_bytes())

# For each of Triton's operations MLIR looks for the module of their dialect, which jaxlib has by another name, in vain:
# two fifths of the time that a training step takes to be lowered.
with contextlib.suppress(ImportError):
    from jaxlib.triton import dialect

    sys.modules.setdefault("jaxlib.mlir.dialects.tt", dialect)


def over_batch(
    call: Callable[..., Any], identity: Any, inputs: Sequence[Array], outputs: Sequence[jax.ShapeDtypeStruct]
) -> Any:
    """`call(*inputs)`, on each device of those images that it has: `outputs`, of as many images as its inputs are.

    Args: identity, of which the text tells what is computed; inputs [batch, ...], or [1, ...] for all images.
    """

    def partition(mesh: Any, arguments: Any, results: Any) -> Any:
        own = NamedSharding(mesh, PartitionSpec(arguments[1].sharding.spec[0]))
        whole = NamedSharding(mesh, PartitionSpec())
        shardings = [whole if a.shape[0] == 1 else own for a in arguments[1:]]
        return mesh, with_identity, jax.tree.map(lambda _: own, results), (whole, *shardings)

    def with_identity(_: Array, *arrays: Array) -> Any:
        return call(*arrays)

    # What stands for the kernel in a program of several devices says nothing of what it computes. The cache of compiled
    # programs, to whose keys `startup.start` leaves no other trace of it, tells programs apart by this number.
    number = jnp.array([zlib.crc32(repr((SOURCE, identity)).encode())], jnp.uint32)
    shapes, count = [*(a.shape for a in inputs), *(o.shape for o in outputs)], itertools.count()
    factors = [
        " ".join([*(["batch"] if shape[0] > 1 else []), *(f"d{next(count)}" for _ in shape[shape[0] > 1 :])])
        for shape in shapes
    ]
    rule = f"{', '.join(['one', *factors[: len(inputs)]])} -> {', '.join(factors[len(inputs) :])}"
    split = custom_partitioning(with_identity)
    split.def_partition(partition=partition, sharding_rule=rule)
    return split(number, *inputs)
