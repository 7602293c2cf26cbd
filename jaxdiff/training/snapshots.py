"""Power-function averages kept at many steps of a run, and the parameters that `sample.weights` names."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdiff import mesh as meshes
from jaxdiff.config import files
from jaxdiff.errors import ConfigError
from jaxdiff.mesh import say
from jaxdiff.training.averages import gamma_of, parse_weights, solve_weights, weighted_sum, widths
from jaxdiff.training.checkpoint import Checkpoints
from jaxdiff.training.step import TrainState


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


class Snapshots:
    """The folder `workdir/snapshots` with a STEP.npz for each kept step: float32 arrays "sigma_rel:WIDTH/PARAMETER".

    `keep` does not bear on it. Its files are a function of the parameters to the last byte.
    """

    def __init__(self, workdir: pathlib.Path) -> None:
        self.folder = workdir / "snapshots"

    @property
    def steps(self) -> list[int]:
        """Steps of all snapshots, ascending."""
        return sorted(int(path.stem) for path in self.folder.glob("*.npz") if path.stem.isdecimal())

    def path(self, step: int) -> pathlib.Path:
        """The file of a step."""
        return self.folder / f"{step:07d}.npz"

    def save(self, step: int, averages: dict[str, Any]) -> None:
        """Write the replicated `averages`, by name, as of a step; what a run that died wrote there, it replaces."""
        if meshes.is_main():
            leaves = jax.tree_util.tree_leaves_with_path(averages)
            arrays: dict[str, Any] = {_name(path): np.asarray(x.addressable_data(0)) for path, x in leaves}
            self.folder.mkdir(exist_ok=True)
            with files.replacing(self.path(step)) as partial, partial.open("wb") as file:
                np.savez(file, **arrays)
        meshes.barrier("snapshot")

    def read(self, step: int, name: str, like: Any) -> Any:
        """One average of a step, in the structure of `like`, on the host."""
        try:
            with np.load(self.path(step)) as data:
                return jax.tree_util.tree_map_with_path(lambda path, _: data[f"{name}/{_name(path)}"], like)
        except Exception as error:  # zipfile's and zlib's own among them
            why = " ".join(str(error).split())
            raise ConfigError(f"{self.path(step)}: cannot be read ({why}); without it the others are used") from None


def state_weights(state: TrainState, weights: str, config: ConfigDict) -> Any:
    """The parameters `weights` of a state, of what is tracked; errors as in `parse_weights`."""
    tracked = {"ema": state.ema, "raw": state.params, **(state.averages or {})}
    return tracked[str(parse_weights(weights, config))]


def restore_weights(checkpoints: Checkpoints, config: ConfigDict, abstract: Any, step: int, weights: str) -> Any:
    """The parameters `weights` at a checkpoint, in the shapes and shardings of `abstract`.

    A width that is not tracked is reconstructed from the checkpoint's averages and all snapshots up to its step.
    Raises: ConfigError where `config`, that of the workdir, tracks no such average, or there are no snapshots for it.
    """
    workdir = checkpoints.folder.parent
    wanted = parse_weights(weights, config, f" in {workdir}")
    if isinstance(wanted, str):
        return checkpoints.restore_params(abstract, step, wanted)
    snapshots, sources = Snapshots(workdir), _sources(config, workdir, step)
    if {at for at, _ in sources} == {step}:
        raise ConfigError(
            f"config.sample.weights = {weights!r}: must be one of {', '.join(widths(config))}, which are tracked: "
            f"{snapshots.folder} has nothing before step {step}; a training with ema_snapshot_every fills it"
        )

    def averages() -> Iterator[Any]:
        kept = snapshots.steps
        for at, name in sources:
            yield snapshots.read(at, name, abstract) if at in kept else checkpoints.restore_params(abstract, at, name)

    gammas = [gamma_of(widths(config)[name]) for _, name in sources]
    shares, error = solve_weights([at for at, _ in sources], gammas, step, gamma_of(wanted))
    say(f"sigma_rel {wanted:g} at step {step:,}: of {len(sources)} averages, profile off by {100 * error:.2g} %")
    total = weighted_sum(shares.tolist(), averages())
    return jax.tree.map(lambda like, x: jax.make_array_from_process_local_data(like.sharding, x), abstract, total)


def averaged_from(config: ConfigDict, workdir: pathlib.Path, settings: ConfigDict, step: int) -> dict[str, Any]:
    """{"averages": widths and steps} that the parameters of a step are reconstructed from, as `settings`, the fields
    `sample`, ask for, and "autoguidance_averages" those of the weak model; without what is tracked itself."""
    models = {"averages": (config, workdir, step)}
    if settings.autoguidance:
        weak = pathlib.Path(settings.autoguidance)
        models["autoguidance_averages"] = files.load(weak / "config.json"), weak, settings.autoguidance_step
    found = {}
    for name, (own, folder, at) in models.items():
        if not isinstance(parse_weights(settings.weights, own), str):
            steps = sorted({s for s, _ in _sources(own, folder, at)})
            found[name] = {"sigma_rel": list(widths(own).values()), "steps": steps}
    return found


def _sources(config: ConfigDict, workdir: pathlib.Path, step: int) -> Sequence[tuple[int, str]]:
    """(step, name) of all averages up to a step: those of the snapshots, and of the checkpoint there."""
    steps = sorted({step, *(s for s in Snapshots(workdir).steps if s <= step)})
    return [(at, name) for at in steps for name in widths(config)]
