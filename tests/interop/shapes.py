"""Shapes of another project's tensors, from those of ours."""

import jax
import numpy as np

from jaxdiff.interop.tensors import export_params


def shapes_of(abstract, names):
    """The shapes of the state dict of a tree of shapes."""
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), abstract)
    return {key: value.shape for key, value in export_params(zeros, names).items()}
