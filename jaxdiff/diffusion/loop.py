"""Sampling: one evaluation of the network and what follows from it, and the loop over them, on the device."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxdiff.diffusion.hoist import hoist
from jaxdiff.diffusion.plan import Plan, Row, plan_row
from jaxdiff.diffusion.process import learned_fraction

Images = Float[Array, "batch *shape"]


class Output(NamedTuple):
    """What a network says: its prediction, and beside it the variance that it learned, both of the shape of x."""

    prediction: Images
    variance: Images


Model = Callable[[Images, Int[Array, " batch"] | Float[Array, " batch"]], Images | Output]


class State(NamedTuple):
    """What a sampler remembers: x, the corrected x of the last evaluation, and the last two predictions of x_0."""

    x: Images
    base: Images
    last: Images
    before: Images


def begin(x: Images) -> State:
    """The state before the first step; what is not known yet has the coefficient 0 there."""
    return State(x, x, x, x)


def denoise_step(
    row: Row, state: State, output: Images | Output, z: Images, *, clip: bool, recompute_eps: bool = True
) -> tuple[State, Images]:
    """One evaluation: the next state, and the prediction of x_0.

    Args:
      row: of a plan, broadcast against x. output: of the network. z: standard normal.
      clip: the prediction of x_0 to [-1, 1]; then eps is recomputed from it (guided-diffusion), unless
        `recompute_eps` is False (diffusers' default).
    Raises: ValueError where the output has another shape than x, such as a learned variance that is not split off.
    """
    f = output.prediction if isinstance(output, Output) else output
    x, c = state.x, row.rule
    if f.shape != x.shape:
        raise ValueError(f"the model's output {f.shape} must have the shape of x {x.shape}: split off other channels")
    x0 = row.x0_x * x + row.x0_f * f
    eps = row.eps_x * x + row.eps_f * f
    if clip:
        x0 = jnp.clip(x0, min=-1, max=1)
        if recompute_eps:
            eps = (x - row.signal * x0) / row.sigma
    k = c.correction
    x = k.x * x + k.base * state.base + k.now * x0 + k.last * state.last + k.before * state.before
    noise = c.noise
    if isinstance(output, Output):
        fraction = learned_fraction(output.variance)
        learned = jnp.exp(0.5 * (fraction * row.log_large + (1 - fraction) * row.log_small))
        noise = jnp.where((row.learned > 0) & (noise > 0), learned, noise)
    following = c.x * x + c.x0 * x0 + c.eps * eps + c.last * state.last + noise * z
    return State(following, x, x0, state.last), x0


def _noise(plan: Plan, keys: PRNGKeyArray, x: Images, i: Int[Array, " k"]) -> Float[Array, "k batch *shape"]:
    """Standard normal numbers of the evaluations i; zeros, which nobody draws, where none of them adds noise."""

    def draw(keys: PRNGKeyArray) -> Images:
        def one(i: Array, key: PRNGKeyArray) -> Array:
            return jax.random.normal(jax.random.fold_in(key, i), x.shape[1:], x.dtype)

        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(i, keys)

    noisy = (plan_row(plan, i).rule.noise > 0).any()
    return jax.lax.cond(noisy, draw, lambda keys: jnp.zeros((*i.shape, *x.shape), x.dtype), keys)


def _step(
    model: Model, plan: Plan, clip: bool, recompute_eps: bool, i: Array, state: State, z: Images
) -> tuple[State, Images]:
    row, x = plan_row(plan, i), state.x
    output = model(row.input_scale * x, jnp.full(x.shape[:1], row.time))
    return denoise_step(row, state, output, z, clip=clip, recompute_eps=recompute_eps)


def _prepared(model: Model, plan: Plan, x: Images) -> Model:
    """`model`, with what does not depend on x and t computed before the loop."""
    row = plan_row(plan, jnp.zeros((), jnp.int32))
    return hoist(model, row.input_scale * x, jnp.full(x.shape[:1], row.time))


def sample(
    model: Model,
    plan: Plan,
    x_init: Images,
    keys: PRNGKeyArray,
    *,
    clip: bool,
    recompute_eps: bool = True,
    together: int = 1,
) -> Images:
    """x after all steps of the plan, from standard normal x_init: one loop on the device, whose length is traced.

    Args: model(x, t) -> what the plan's `prediction` says, for x scaled as it says; keys, one a sample (`sample_keys`);
      clip, recompute_eps as in `denoise_step`; together, static: evaluations, of which there are a multiple, until the
      host sees whether there are more and whether they add noise, for which a GPU waits (`evaluations_together`).
    Raises: ValueError where the number of evaluations is known and is no multiple of `together`.
    """
    if not isinstance(plan.num_steps, jax.core.Tracer) and plan.num_steps % together:
        raise ValueError(f"together = {together}: must divide the plan's {plan.num_steps} evaluations")
    model = _prepared(model, plan, x_init)

    def turn(number: Array, state: State) -> State:
        first = together * number
        z = _noise(plan, keys, state.x, first + jnp.arange(together))

        def body(j: Array, state: State) -> State:
            return _step(model, plan, clip, recompute_eps, first + j, state, z[j])[0]

        return jax.lax.fori_loop(0, together, body, state)

    return jax.lax.fori_loop(0, plan.num_steps // together, turn, begin(plan.initial_scale * x_init)).x


def trajectory(
    model: Model,
    plan: Plan,
    x_init: Images,
    keys: PRNGKeyArray,
    *,
    num_steps: int,
    clip: bool,
    recompute_eps: bool = True,
) -> tuple[Float[Array, "n batch *shape"], Float[Array, "n batch *shape"]]:
    """All x and all predictions of x_0 over the first `num_steps` evaluations, by `lax.scan`; otherwise as `sample`."""
    model = _prepared(model, plan, x_init)

    def body(state: State, i: Array) -> tuple[State, tuple[Images, Images]]:
        (z,) = _noise(plan, keys, state.x, i[None])
        state, x0 = _step(model, plan, clip, recompute_eps, i, state, z)
        return state, (state.x, x0)

    return jax.lax.scan(body, begin(plan.initial_scale * x_init), jnp.arange(num_steps))[1]


def sample_keys(key: PRNGKeyArray, indices: Int[Array, " batch"]) -> PRNGKeyArray:
    """One key a sample: all the randomness of sample number k depends on (key, k) alone."""
    return jax.vmap(lambda k: jax.random.fold_in(key, k))(indices)


def initial_noise(keys: PRNGKeyArray, shape: tuple[int, ...]) -> Images:
    """Standard normal x_T of every sample, [B, *shape]."""
    beyond_all_steps = 2**31 - 1
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, beyond_all_steps), shape))(keys)
