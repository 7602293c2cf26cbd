"""The training state and one optimiser step, jitted over the mesh."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxdiff.keys import named_key
from jaxdiff.mesh import batch_sharding, replicated
from jaxdiff.models import forms
from jaxdiff.training.averages import Update, new_averages, update_all
from jaxdiff.training.draws import draw_at_once
from jaxdiff.training.optimizer import ema_update, global_norm

Params = Any
Batch = dict[str, Array]
Metrics = dict[str, Float[Array, " batch"]]


class TrainState(NamedTuple):
    """All that a run carries from step to step; replicated, float32 parameters. The critic's are () without one, and so
    are the averages by name beside `ema`."""

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: optax.OptState
    critic: Params = ()
    critic_opt_state: optax.OptState = ()
    averages: Any = ()
    memory: Any = ()  # of the objective, where it has one


class Critic(NamedTuple):
    """Parameters that the loss itself has, trained in the same step by an optimiser of their own.

    init: key -> parameters. gradient: (params, critic, prepared, step, frozen) -> the gradients for both, and metrics.
    """

    init: Callable[[PRNGKeyArray], Params]
    gradient: Callable[
        [Params, Params, Batch, Int[Array, ""], Any], tuple[tuple[Params, Params], dict[str, Float[Array, ""]]]
    ]


class Memory(NamedTuple):
    """What an objective carries from step to step: its beginning, and (memory, prepared, per-sample metrics) -> memory
    after each step."""

    initial: Any
    update: Callable[[Any, Batch, Metrics], Any]


class Objective(NamedTuple):
    """What is minimised, in two parts, so that a batch can be computed in pieces with the same draws.

    `prepare(batch, key, memory)` makes all random draws and returns arrays with the batch axis first; the memory is ()
    in evaluation, and where there is none. `loss(params, prepared, dropout_key, frozen)` returns per-sample losses [B]
    and per-sample metrics; its key is None in evaluation: no dropout. `frozen` are parameters of other networks that it
    uses. With a `critic`, training takes its gradient.
    """

    prepare: Callable[..., Batch]
    loss: Callable[[Params, Batch, PRNGKeyArray | None, Any], tuple[Float[Array, " batch"], Metrics]]
    frozen: Any = ()
    critic: Critic | None = None
    memory: Memory | None = None


def formats(state: Any, mesh: Mesh, gpu: bool | None = None) -> Any:
    """How a state, or its shapes, lies on all devices: a tree of shardings, or of these with a layout.

    On GPUs (by default: where programs are for such) the kernels of convolutions lie as cuDNN takes them and returns
    their gradients, features first, which saves the transpositions of every step.
    """
    everywhere = replicated(mesh)

    def format_of(x: Any) -> Format | NamedSharding:
        kernel = len(x.shape) == 4 and x.shape[0] > 1
        return Format(Layout((3, 0, 1, 2)), everywhere) if kernel else everywhere

    gpu = forms.for_gpu() if gpu is None else gpu
    return jax.tree.map(format_of, state) if gpu else jax.tree.map(lambda _: everywhere, state)


def abstract_state(create: jax.stages.Wrapped, mesh: Mesh) -> TrainState:
    """The shapes and `formats` of the state that `make_init`'s `create` returns."""
    shapes = jax.eval_shape(create, named_key(0, "init"))
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, formats(shapes, mesh)
    )


def make_init(
    init: Callable[[PRNGKeyArray], Params],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    critic: Critic | None = None,
    averages: Iterable[str] = (),
    memory: Memory | None = None,
) -> jax.stages.Wrapped:
    """Jitted key -> state of step 0, in the `formats` of the step."""

    def create(key: PRNGKeyArray) -> TrainState:
        return new_state(draw_at_once(init)(key), optimizer, key, critic, averages, memory)

    shapes = jax.eval_shape(create, named_key(0, "init"))
    return jax.jit(create, out_shardings=formats(shapes, mesh))


def new_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    critic: Critic | None = None,
    averages: Iterable[str] = (),
    memory: Memory | None = None,
) -> TrainState:
    """State of step 0 with these parameters, `ema` and the `averages` equal to them; `key` is for the critic's."""
    state = TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    state = state._replace(averages=new_averages(averages, params), memory=memory.initial if memory else ())
    if critic:
        inner = draw_at_once(critic.init)(jax.random.fold_in(key, 1))
        state = state._replace(critic=inner, critic_opt_state=optimizer.init(inner))
    return state


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    seed: int,
    ema_decay: float,
    accumulate: int = 1,
    averages: Mapping[str, Update] | None = None,
) -> "TrainStep":
    """(state, batch, frozen) -> (state, metrics), jitted; the state is donated, the batch split over the mesh.

    Metrics are means over the global batch, with "loss", "lr" and "grad_norm" (before clipping) among them. With
    `accumulate` parts the gradient is the same mean, computed part by part, in 1/accumulate of the memory. `frozen` is
    that of the objective, `averages` those of the state beside `ema`.
    """
    root, dropout_root = named_key(seed, "train"), named_key(seed, "dropout")

    # Beside gradients and mean metrics, what an objective with a memory has to see of each sample.
    Gradient = tuple[Any, dict[str, Array], Any]

    def mean_loss(params: Params, inputs: Batch, key: PRNGKeyArray, frozen: Any) -> tuple[Array, Any]:
        loss, metrics = objective.loss(params, inputs, key, frozen)
        means = {name: value.mean() for name, value in {"loss": loss, **metrics}.items()}
        return loss.mean(), (means, metrics if objective.memory else ())

    def gradient(state: TrainState, inputs: Batch, key: PRNGKeyArray, frozen: Any) -> Gradient:
        if objective.critic:
            return *objective.critic.gradient(state.params, state.critic, inputs, state.step, frozen), ()
        grads, (metrics, seen) = jax.grad(mean_loss, has_aux=True)(state.params, inputs, key, frozen)
        return (grads, ()), metrics, seen

    def accumulated(state: TrainState, inputs: Batch, key: PRNGKeyArray, frozen: Any) -> Gradient:
        # Part i takes rows i, i + A, i + 2A, ...: each device cuts its own rows, nothing moves between them.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), inputs)

        def add(total: Any, part: tuple[Array, Batch]) -> tuple[Any, Any]:
            index, piece = part
            *one, seen = gradient(state, piece, jax.random.fold_in(key, index), frozen)
            return jax.tree.map(lambda a, b: a + b / accumulate, total, one), seen

        piece = jax.tree.map(lambda x: x[0], parts)
        *shapes, _ = jax.eval_shape(gradient, state, piece, key, frozen)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (grads, metrics), seen = jax.lax.scan(add, zeros, (jnp.arange(accumulate), parts))
        return grads, metrics, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), seen)

    def step(state: TrainState, batch: Batch, frozen: Any) -> tuple[TrainState, dict[str, Array]]:
        inputs = objective.prepare(batch, jax.random.fold_in(root, state.step), state.memory)
        key = jax.random.fold_in(dropout_root, state.step)
        (grads, critic_grads), metrics, seen = (accumulated if accumulate > 1 else gradient)(state, inputs, key, frozen)
        metrics |= {"lr": jnp.asarray(schedule(state.step)), "grad_norm": global_norm(grads)}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = ema_update(state.ema, params, state.step, ema_decay)
        others = update_all(state.averages, params, state.step, averages or {})
        state = state._replace(step=state.step + 1, params=params, ema=ema, opt_state=opt_state, averages=others)
        if objective.memory:
            state = state._replace(memory=objective.memory.update(state.memory, inputs, seen))
        if objective.critic:
            updates, opt_state = optimizer.update(critic_grads, state.critic_opt_state, state.critic)
            state = state._replace(critic=optax.apply_updates(state.critic, updates), critic_opt_state=opt_state)
        return state, metrics

    return TrainStep(step, mesh)


class TrainStep:
    """A step, jitted for states in their `formats`; to be called, traced and lowered as what jax.jit returns."""

    def __init__(self, step: Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, Array]]], mesh: Mesh):
        self.__wrapped__, self._mesh = step, mesh
        self._jitted: dict[Any, jax.stages.Wrapped] = {}

    def _jit(self, state: TrainState) -> jax.stages.Wrapped:
        leaves, tree = jax.tree.flatten(formats(state, self._mesh))
        key = (tree, tuple(leaves))
        if key not in self._jitted:
            whole, split, lies = replicated(self._mesh), batch_sharding(self._mesh), jax.tree.unflatten(tree, leaves)
            places: dict[str, Any] = {"in_shardings": (lies, split, whole), "out_shardings": (lies, whole)}
            self._jitted[key] = jax.jit(self.__wrapped__, **places, donate_argnums=0)
        return self._jitted[key]

    def __call__(self, state: TrainState, batch: Batch, frozen: Any) -> tuple[TrainState, dict[str, Array]]:
        return self._jit(state)(state, batch, frozen)

    def trace(self, state: TrainState, batch: Batch, frozen: Any) -> jax.stages.Traced:
        return self._jit(state).trace(state, batch, frozen)

    def lower(self, state: TrainState, batch: Batch, frozen: Any) -> jax.stages.Lowered:
        return self._jit(state).lower(state, batch, frozen)


def make_eval_step(
    objective: Objective, mesh: Mesh, *, seed: int
) -> Callable[[Params, Batch, Int[Array, ""], Any], dict[str, Array]]:
    """Jitted (params, batch, index, frozen) -> weighted sums of loss and metrics over the samples, and of weights.

    The sum of the weights is called "weight". The draws are a function of (seed, index): every evaluation sees the
    same noise.
    """
    root = named_key(seed, "eval")

    def step(params: Params, batch: Batch, index: Int[Array, ""], frozen: Any) -> dict[str, Array]:
        weight = batch["weight"]
        inputs = objective.prepare(batch, jax.random.fold_in(root, index))
        loss, metrics = objective.loss(params, inputs, None, frozen)
        values = {"loss": loss, **metrics, "weight": jnp.ones_like(loss)}
        return {name: (value * weight).sum() for name, value in values.items()}

    whole, split = replicated(mesh), batch_sharding(mesh)
    return jax.jit(step, in_shardings=(whole, split, whole, whole), out_shardings=whole)
