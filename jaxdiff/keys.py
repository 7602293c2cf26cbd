"""Randomness by name and step: every key is a function of (seed, name, step), none has to be carried along."""

import zlib

import jax
from jaxtyping import Array, Int, PRNGKeyArray


def named_key(seed: int | Int[Array, ""], name: str) -> PRNGKeyArray:
    """Key of the random stream `name` of a run with `seed`; draws of step k use `fold_in(named_key(...), k)`."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
