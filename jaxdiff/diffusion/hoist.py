"""What a loop computes anew in every turn although it depends on nothing that changes, computed once before it.

XLA leaves it inside: parameters in the dtype of the computation, kernels that are folded, keys and values of tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxpr_as_fun

GROWTH = 2  # what is more than so many times as large as what it is made of is cheaper made than read


def hoist(function: Callable[..., Any], *examples: Any) -> Callable[..., Any]:
    """`function`, for arguments of the shapes and dtypes of `examples`, with all that does not depend on them computed
    now: operations on what it closes over, but those whose results are larger than `GROWTH` times their inputs, and
    those inside of a loop, of a branch or of `jax.checkpoint`."""
    closed, out = jax.make_jaxpr(function, return_shape=True)(*examples)
    jaxpr, known = closed.jaxpr, set(closed.jaxpr.constvars)
    now: list[JaxprEqn] = []
    later: list[JaxprEqn] = []
    for eqn in jaxpr.eqns:
        inputs = [v for v in eqn.invars if not isinstance(v, Literal)]
        if inputs and known.issuperset(inputs) and not eqn.effects and _size(eqn.outvars) <= GROWTH * _size(inputs):
            now.append(eqn)
            known.update(eqn.outvars)
        else:
            later.append(eqn)
    used = [v for eqn in later for v in eqn.invars] + list(jaxpr.outvars)
    wanted = list(dict.fromkeys(v for v in used if not isinstance(v, Literal) and v in known))
    unnamed = jaxpr.debug_info.with_unknown_names()
    before = jaxpr.replace(invars=jaxpr.constvars, constvars=[], eqns=now, outvars=wanted, debug_info=unnamed)
    after = jaxpr.replace(constvars=wanted, eqns=later)
    values = jax.jit(jaxpr_as_fun(ClosedJaxpr(before, [])))(*closed.consts)
    rest = jaxpr_as_fun(ClosedJaxpr(after, values))
    return lambda *args: jax.tree.unflatten(jax.tree.structure(out), rest(*jax.tree.leaves(args)))


def _size(variables: Sequence[Any]) -> int:
    return sum(v.aval.size for v in variables)
