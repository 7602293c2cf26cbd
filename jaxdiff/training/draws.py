"""All random numbers of an initialisation in one draw, which XLA compiles in a fraction of the time of hundreds."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import PRNGKeyArray

from jaxdiff.models import forms


def draw_at_once(init: Callable[[PRNGKeyArray], Any]) -> Callable[[PRNGKeyArray], Any]:
    """`init` with the random bits of all its draws taken from one, in their order, whatever their own keys are.

    Their distributions are the same, their values are not. What its result does not depend on is left out; draws within
    loops and branches stay as they are.
    """

    def drawn(key: PRNGKeyArray) -> Any:
        with forms.without_kernels():
            closed, out = jax.make_jaxpr(init, return_shape=True)(key)
        jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
        bits, used = jax.random.bits(key, (_count(jaxpr),)), 0

        def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
            nonlocal used
            unnamed = jaxpr.debug_info.with_unknown_names()
            values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

            def value(v: Any) -> Any:
                return v.val if isinstance(v, Literal) else values[v]

            for eqn in jaxpr.eqns:
                if (number := _words(eqn)) is not None:
                    taken = bits[used : used + number]
                    results, used = [taken.reshape(eqn.params["shape"])], used + number
                elif inner := _called(eqn):
                    results = evaluate(inner.jaxpr, inner.consts, [value(v) for v in eqn.invars])
                else:
                    variables = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, Literal)))
                    alone = {"constvars": [], "invars": variables, "outvars": eqn.outvars}
                    function = jaxpr_as_fun(ClosedJaxpr(jaxpr.replace(eqns=[eqn], debug_info=unnamed, **alone), []))
                    results = function(*(values[v] for v in variables))
                values.update(zip(eqn.outvars, results, strict=True))
            return [value(v) for v in jaxpr.outvars]

        return jax.tree.unflatten(jax.tree.structure(out), evaluate(jaxpr, closed.consts, [key]))

    return drawn


def _words(eqn: JaxprEqn) -> int | None:
    """How many 32-bit numbers an equation draws; None where it does not."""
    if eqn.primitive.name != "random_bits" or eqn.params["bit_width"] != 32:
        return None
    return math.prod(eqn.params["shape"])


def _called(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The jitted function that an equation calls."""
    return eqn.params["jaxpr"] if eqn.primitive.name in ("jit", "pjit") else None


def _count(jaxpr: Any) -> int:
    inner = (_called(eqn) for eqn in jaxpr.eqns)
    return sum(_words(eqn) or 0 for eqn in jaxpr.eqns) + sum(_count(called.jaxpr) for called in inner if called)
