"""Between our parameter trees and torch's flat state dicts, given which name belongs to which parameter."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxdiff.errors import ConfigError
from jaxdiff.state_dicts import Tensors

# Path of a parameter, "encoder/conv_in/kernel", to the tensors that it is made of, along its last axis.
Names = Callable[[str], list[str]]


def to_torch(value: np.ndarray, leaf: str) -> np.ndarray:
    """A kernel [h, w, in, out] or [in, out] as torch has it, [out, in, h, w] or [out, in]; other leaves unchanged."""
    if leaf != "kernel":
        return value
    return np.transpose(value, (3, 2, 0, 1) if value.ndim == 4 else (1, 0))


def from_torch(value: np.ndarray, leaf: str) -> np.ndarray:
    """The inverse of `to_torch`."""
    if leaf != "kernel":
        return value
    return np.transpose(value, (2, 3, 1, 0) if value.ndim == 4 else (1, 0))


def export_params(params: Any, names: Names) -> Tensors:
    """The state dict of a parameter tree."""
    tensors = {}
    for path, value in _leaves(params):
        leaf, parts = path.rsplit("/", 1)[1], names(path)
        for name, part in zip(parts, np.split(np.asarray(value), len(parts), axis=-1), strict=True):
            tensors[name] = np.ascontiguousarray(to_torch(part, leaf))
    return tensors


def import_params(tensors: Mapping[str, np.ndarray], abstract: Any, names: Names, where: str) -> Any:
    """The tree of the shapes `abstract` from a state dict.

    Raises: ConfigError naming all tensors that are missing in `where`, or of another shape, or not of this network.
    """
    rest, missing, misshapen = dict(tensors), [], []

    def take(path: str, shape: tuple[int, ...]) -> np.ndarray | None:
        leaf, parts = path.rsplit("/", 1)[1], names(path)
        expected = to_torch(np.empty((*shape[:-1], shape[-1] // len(parts))), leaf).shape
        found = []
        for name in parts:
            if name not in rest:
                missing.append(name)
                continue
            value = rest.pop(name)
            ones = (1,) * (value.ndim - len(expected))
            if value.shape == (*expected, *ones):  # attention as convolutions of size 1, as latent-diffusion and ADM
                value = value.reshape(expected)
            if value.shape != expected:
                misshapen.append(f"{name} {list(value.shape)}, not {list(expected)}")
                continue
            found.append(from_torch(value, leaf))
        return np.concatenate(found, axis=-1) if len(found) == len(parts) else None

    values = [take(path, leaf.shape) for path, leaf in _leaves(abstract)]
    for what, wrong in (("misses", missing), ("has another shape of", misshapen), ("has besides", sorted(rest))):
        if wrong:
            raise ConfigError(f"--from: {where} is of another network: it {what} {', '.join(wrong)}")
    return jax.tree.unflatten(jax.tree.structure(abstract), values)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [("/".join(str(key.key) for key in path), leaf) for path, leaf in leaves]
