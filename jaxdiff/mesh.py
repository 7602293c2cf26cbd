"""Devices and processes: one mesh axis "data", over which batches are split and the state is replicated."""

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdiff.errors import ConfigError

VARIABLES = ("JAXDIFF_COORDINATOR", "JAXDIFF_NUM_PROCESSES", "JAXDIFF_PROCESS_ID")


def initialize_distributed() -> None:
    """Join the other processes of the run: those of a Slurm job step, or those the JAXDIFF_* variables tell of.

    Raises: ConfigError when only some of the variables JAXDIFF_{COORDINATOR,NUM_PROCESSES,PROCESS_ID} are set.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given:
        if missing := [name for name in VARIABLES if name not in given]:
            raise ConfigError(f"{missing[0]} is not set, but {', '.join(given)} is: set all of {', '.join(VARIABLES)}")
        coordinator, count, index = given.values()
        jax.distributed.initialize(coordinator, int(count), int(index))
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NUM_TASKS" in os.environ:
        jax.distributed.initialize()  # it knows Slurm's variables


def make_mesh() -> Mesh:
    """All devices of all processes along the axis "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Host arrays, equal on all processes, as global arrays that every device holds whole."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def put_batch(tree: Any, mesh: Mesh) -> Any:
    """Host arrays, whole and equal on all processes, as global arrays split along their first axis."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i]), tree)


def to_host(tree: Any) -> Any:
    """Global arrays as whole numpy arrays on every process."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)


def is_main() -> bool:
    """Whether this process writes the files and prints."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Print on one process: the line at once, as another thread may have something to say."""
    if is_main():
        print(f"{line}\n", end="", flush=True)


def barrier(name: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_agree(yes: bool) -> bool:
    """Whether `yes` is true on all processes."""
    return bool(np.all(multihost_utils.process_allgather(np.array(yes)))) if jax.process_count() > 1 else yes
