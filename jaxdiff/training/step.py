"""The training state and one optimiser step, jitted over the mesh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxdiff.keys import named_key
from jaxdiff.mesh import batch_sharding, replicated
from jaxdiff.training.optimizer import ema_update

Params = Any
Batch = dict[str, Array]
Metrics = dict[str, Float[Array, " batch"]]


class TrainState(NamedTuple):
    """All that a run carries from step to step; replicated, float32 parameters."""

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: optax.OptState


class Objective(NamedTuple):
    """What is minimised, in two parts, so that a batch can be computed in pieces with the same draws.

    `prepare(batch, key)` makes all random draws and returns arrays with the batch axis first; `loss(params, prepared,
    dropout_key)` returns per-sample losses [B] and per-sample metrics; no dropout when its key is None.
    """

    prepare: Callable[[Batch, PRNGKeyArray], Batch]
    loss: Callable[[Params, Batch, PRNGKeyArray | None], tuple[Float[Array, " batch"], Metrics]]


def init_state(
    init: Callable[[PRNGKeyArray], Params], optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
) -> TrainState:
    """State of step 0, the average equal to the parameters."""

    def create(key: PRNGKeyArray) -> TrainState:
        params = init(key)
        return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))

    return jax.jit(create, out_shardings=replicated(mesh))(named_key(seed, "init"))


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    seed: int,
    ema_decay: float,
    accumulate: int = 1,
) -> jax.stages.Wrapped:
    """Jitted (state, batch) -> (state, metrics); the state is donated, the batch split over the mesh.

    Metrics are means over the global batch, with "loss", "lr" and "grad_norm" (before clipping) among them. With
    `accumulate` parts the gradient is the same mean, computed part by part, in 1/accumulate of the memory.
    """
    root, dropout_root = named_key(seed, "train"), named_key(seed, "dropout")

    def mean_loss(params: Params, inputs: Batch, key: PRNGKeyArray) -> tuple[Array, dict[str, Array]]:
        loss, metrics = objective.loss(params, inputs, key)
        metrics = {"loss": loss, **metrics}
        return loss.mean(), {name: value.mean() for name, value in metrics.items()}

    def gradient(params: Params, inputs: Batch, key: PRNGKeyArray) -> tuple[Params, dict[str, Array]]:
        grads, metrics = jax.grad(mean_loss, has_aux=True)(params, inputs, key)
        return grads, metrics

    def accumulated(params: Params, inputs: Batch, key: PRNGKeyArray) -> tuple[Params, dict[str, Array]]:
        # Part i takes rows i, i + A, i + 2A, ...: each device cuts its own rows, nothing moves between them.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), inputs)

        def add(total: Any, part: tuple[Array, Batch]) -> tuple[Any, None]:
            index, piece = part
            one = gradient(params, piece, jax.random.fold_in(key, index))
            return jax.tree.map(lambda a, b: a + b / accumulate, total, one), None

        piece = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, params, piece, key))
        return jax.lax.scan(add, zeros, (jnp.arange(accumulate), parts))[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        inputs = objective.prepare(batch, jax.random.fold_in(root, state.step))
        key = jax.random.fold_in(dropout_root, state.step)
        grads, metrics = (accumulated if accumulate > 1 else gradient)(state.params, inputs, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"lr": jnp.asarray(schedule(state.step)), "grad_norm": optax.tree.norm(grads)}
        ema = ema_update(state.ema, params, state.step, ema_decay)
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    whole, split = replicated(mesh), batch_sharding(mesh)
    return jax.jit(step, in_shardings=(whole, split), out_shardings=(whole, whole), donate_argnums=0)


def make_eval_step(
    objective: Objective, mesh: Mesh, *, seed: int
) -> Callable[[Params, Batch, Int[Array, ""]], dict[str, Array]]:
    """Jitted (params, batch, index) -> weighted sums of the per-sample loss and metrics, and "weight", their divisor.

    The draws are a function of (seed, index): every evaluation sees the same noise.
    """
    root = named_key(seed, "eval")

    def step(params: Params, batch: Batch, index: Int[Array, ""]) -> dict[str, Array]:
        weight = batch["weight"]
        inputs = objective.prepare(batch, jax.random.fold_in(root, index))
        loss, metrics = objective.loss(params, inputs, None)
        values = {"loss": loss, **metrics, "weight": jnp.ones_like(loss)}
        return {name: (value * weight).sum() for name, value in values.items()}

    whole, split = replicated(mesh), batch_sharding(mesh)
    return jax.jit(step, in_shardings=(whole, split, whole), out_shardings=whole)
