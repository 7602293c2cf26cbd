"""jaxdiff's side of the benchmarks: the training step and the sampler that users run."""

from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks.harness import Side, Work, first_device
from jaxdiff import mesh as meshes
from jaxdiff.data.latents import Whitening
from jaxdiff.generator import Generator
from jaxdiff.keys import named_key
from jaxdiff.models import Network
from jaxdiff.models.layers import count_params
from jaxdiff.training.draws import draw_at_once
from jaxdiff.training.experiments import build_recipe
from jaxdiff.training.flops import count_flops, jaxpr_flops
from jaxdiff.training.objectives import diffusion_objective
from jaxdiff.training.optimizer import recipe_optimizer, total_steps
from jaxdiff.training.step import TrainStep, make_init, make_train_step

BATCHES = 4  # different ones, that lie on the device


class Training(NamedTuple):
    """A compiled training step that takes turns, its FLOPs (None, and why, where they cannot be counted), the first
    parameters on the host, and the step's memory in bytes by XLA."""

    side: Side
    flops: int | None
    params: Any
    memory: dict[str, int]


def whitening_of(work: Work) -> Whitening | None:
    """That of a work's latents, which are drawn to need none; None for images."""
    return Whitening([0.0] * work.shape[-1], [1.0] * work.shape[-1]) if work.latents else None


def draw_batch(work: Work, size: int, seed: int) -> dict[str, np.ndarray]:
    """A batch as the data pipeline has it, of random numbers."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, max(work.classes, 1), size, np.int32)
    shape = (size, *work.shape)
    if not work.latents:
        return {"image": rng.integers(0, 256, shape, np.uint8), "label": label}
    mean = rng.standard_normal(shape, np.float32)
    return {"mean": mean, "logvar": np.full(shape, -6, np.float32), "label": label}


def new_generator(work: Work, config: ConfigDict, mesh: Mesh | None = None) -> Generator:
    """The generator of a work's network, whose parameters are as many as published; by default on one device."""
    generator = Generator(config, work.shape, work.classes, mesh or first_device())
    count = count_params(generator.abstract_params())
    if work.count and count != work.count:
        raise ValueError(f"the network has {count:,} parameters, not {work.count:,}")
    return generator


def initialiser(generator: Generator) -> Any:
    """key -> parameters, as in `diffusion_experiment`."""
    one = jnp.zeros((1,), jnp.int32)
    return lambda key: generator.network.init(key, jnp.zeros((1, *generator.shape)), one, one)


def try_flops(name: str, count: Any) -> int | None:
    """`count()`, or None after saying why not."""
    try:
        return count()
    except ValueError as error:
        print(f"{name}: no MFU: {error}", flush=True)
        return None


def step_and_init(work: Work, config: ConfigDict, generator: Generator) -> tuple[TrainStep, jax.stages.Wrapped]:
    """The step of `config`, and key -> its first state."""
    objective = diffusion_objective(
        generator.network,
        generator.process,
        build_recipe(config),
        null_label=work.classes,
        whitening=whitening_of(work),
    )
    optimizer, schedule = recipe_optimizer(config, total_steps(config, 0))
    mesh, options = generator.mesh, {"seed": config.seed, "ema_decay": config.ema_decay}
    step = make_train_step(objective, optimizer, schedule, mesh, accumulate=config.accumulate, **options)
    return step, make_init(initialiser(generator), optimizer, mesh)


def training(work: Work, config: ConfigDict, *, keep_params: bool = True) -> Training:
    """The step of `config`: objective, AdamW on clipped gradients, moving average; compiled as the training loop does.

    As there, the metrics of a step are waited for when the next one is under way.
    """
    generator = new_generator(work, config)
    mesh, (step, create) = generator.mesh, step_and_init(work, config, generator)
    state = create(named_key(config.seed, "init"))
    params = meshes.to_host(state.params) if keep_params else None
    batches = [meshes.put_batch(draw_batch(work, config.batch_size, k), mesh) for k in range(BATCHES)]
    traced = step.trace(state, batches[0], ())
    compiled = traced.lower().compile()
    done = 0

    def run(steps: int) -> float:
        nonlocal state, done
        pending = None
        for _ in range(steps):
            state, metrics = compiled(state, batches[done % BATCHES], ())
            if pending is not None:
                jax.block_until_ready(pending)
            pending, done = metrics, done + 1
        jax.block_until_ready(state)
        return float(pending["loss"])

    analysis = compiled.memory_analysis()
    names = {"temp": "temp_size_in_bytes", "arguments": "argument_size_in_bytes"}
    memory = {name: int(getattr(analysis, attribute, 0)) for name, attribute in names.items()}
    return Training(Side(run), try_flops("training", lambda: jaxpr_flops(traced.jaxpr)), params, memory)


def random_params(generator: Generator, seed: int) -> Any:
    """Initial parameters with small numbers in the place of zeros, without which the network returns nothing."""

    # Two programs: XLA takes longer for both as one.
    key, whole = named_key(seed, "init"), meshes.replicated(generator.mesh)
    params = jax.jit(draw_at_once(initialiser(generator)), out_shardings=whole)(key)

    def add_noise(params: Any, key: Any) -> Any:
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        return unravel(flat + 0.02 * jax.random.normal(key, flat.shape))

    return jax.jit(add_noise, out_shardings=whole)(params, jax.random.fold_in(key, 1))


class Sampling(NamedTuple):
    """A sampler that takes turns at batches of `config.sample`, its FLOPs a batch, and its parameters on the host."""

    side: Side
    flops: int | None
    params: Any
    network: Network


def sampling(work: Work, config: ConfigDict) -> Sampling:
    """`Generator` as --mode=sample calls it: labels of the host in, uint8 images of the host out."""
    generator = new_generator(work, config)
    params = random_params(generator, config.seed)
    labels = np.arange(config.sample.num, dtype=np.int32) % max(work.classes, 1)
    x, row = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((len(labels), *work.shape), (len(labels),)))
    y = jax.ShapeDtypeStruct(row.shape, jnp.int32)

    def run(batches: int) -> np.ndarray:
        for _ in range(batches):
            images = generator(params, config.sample, labels)
        return images

    # The sampler's own loop has as many turns as it is told: its FLOPs are those of the evaluations of the network.
    forward = try_flops("sampling", lambda: count_flops(generator.network.apply, params, x, row, y))
    flops = forward and config.sample.steps * forward
    return Sampling(Side(run), flops, meshes.to_host(params), generator.network)
