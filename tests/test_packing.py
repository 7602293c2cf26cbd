"""Many small arrays as one."""

import jax
import numpy as np
import pytest

from jaxdiff.packing import pack, unpack


def test_a_tree_comes_back_to_the_bit():
    tree = {
        "float": np.array([[1.5, -0.0], [np.inf, 1e-40]], np.float32),
        "int": (np.int32(-7), np.arange(3, dtype=np.int32)),
        "unsigned": np.uint32(2**32 - 1),
        "none": np.zeros((0, 4), np.float32),
    }
    packed, packing = pack(tree)
    assert packed.shape == (4 + 1 + 3 + 1,) and hash(packing) == hash(pack(tree)[1])
    got = jax.jit(unpack, static_argnums=1)(packed, packing)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert np.asarray(mine).tobytes() == theirs.tobytes()


@pytest.mark.parametrize("number", [1.5, np.int64(3), np.zeros(2, np.float16)])
def test_numbers_of_other_sizes_are_refused(number):
    with pytest.raises(TypeError, match=r"an array of (float64|int64|float16): must be of 32 bits"):
        pack({"a": np.int32(1), "b": number})
