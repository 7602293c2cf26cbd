"""The fast forms of layers beside the plain ones: milliseconds of a forward pass, and of a backward pass after it.

    python -m benchmarks.layers           # at the shapes of the networks of benchmarks.train_step, on a GPU
    python -m benchmarks.layers --tiles=4096x64x16,8192x32x16    # norms cut otherwise, for another GPU
    python -m benchmarks.layers --tiny    # a rehearsal on a CPU, where norms and sums of products have one form

Bfloat16. The backward pass is the gradients of all inputs, as the difference to both passes in one program. "traffic"
is what the arrays of a norm, or of a sum of products, take to be read and written once at the speed of a large copy,
which is measured first. "from float32" is how far a convolution and its gradients are from those of float32: of the
worst of these the root mean square difference, as a share of its own. A tile is its elements x the channels of a block
at least x the elements of a thread, in `models/norm_tiles.py`.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import markdown, one_line
from jaxdiff.models import attention, convolutions, norm, products
from jaxdiff.models.layers import FORMS
from jaxdiff.models.norm import Norm

NORMS = [  # batch, positions, channels of the parts
    *[(512, 1024, (128,)), (512, 1024, (256, 128)), (512, 1024, (128, 128)), (512, 256, (256,))],
    *[(512, 256, (256, 256)), (512, 64, (256,)), (64, 16384, (128,)), (64, 16384, (128, 128)), (64, 4096, (256,))],
]
ADDED = [  # batch, height and width, channels, features, channels of maps whose products are added; (): a map itself
    *[(512, 32, 128, 128, ()), (512, 32, 384, 128, None), (512, 32, 128, 128, (256, 128)), (512, 16, 256, 256, ())],
    *[(512, 16, 256, 256, (256, 256)), (512, 8, 256, 256, ()), (512, 4, 256, 256, (256, 256))],
    *[(64, 128, 128, 128, ()), (64, 64, 256, 128, None), (64, 16, 384, 384, ()), (64, 8, 512, 512, (512, 512))],
]
CONVOLUTIONS = [  # form, shape of the input, features
    *[("up", (512, 16, 16, 256), 256), ("up", (64, 32, 32, 256), 256), ("up", (64, 64, 64, 128), 128)],
    *[("few", (512, 32, 32, 128), 3), ("few", (64, 128, 128, 128), 3)],
]
PRODUCTS = [  # batch, positions, channels of the parts, features
    *[(512, 1024, (256, 128), 128), (512, 1024, (128, 128), 128), (512, 256, (256, 256), 256)],
    *[(64, 16384, (128, 128), 128), (64, 4096, (256, 128), 128)],
]
ATTENTION = [(512, 256, 4), (64, 256, 6), (64, 512, 8)]  # batch, positions, heads of 64 channels
DTYPE = jnp.bfloat16


def milliseconds(function: Callable[..., Any], *args: Any, times: int = 20) -> float:
    """The shortest mean of three rounds."""
    jax.block_until_ready(function(*args))

    def round_of() -> float:
        begin = time.perf_counter()
        for _ in range(times):
            result = function(*args)
        jax.block_until_ready(result)
        return 1e3 * (time.perf_counter() - begin) / times

    return min(round_of() for _ in range(3))


def both_ways(function: Callable[..., Any], inputs: Any, gradient: Any) -> tuple[float, float]:
    """Milliseconds of `function(*inputs)`, and of the gradients of the inputs from that of its result.

    Of several results the first is returned: the others of a norm are its inputs, which would be copied.
    """

    def first(result: Any) -> jax.Array:
        return jax.tree.leaves(result)[0]

    def both(inputs: Any, gradient: Any) -> Any:
        result, backward = jax.vjp(function, *inputs)
        return first(result), backward(gradient)

    forward = milliseconds(jax.jit(lambda *inputs: first(function(*inputs))), *inputs)
    return forward, milliseconds(jax.jit(both), inputs, gradient) - forward


def draw(*shape: int, dtype: Any = DTYPE) -> jax.Array:
    """Standard normal numbers."""
    return jax.random.normal(jax.random.key(sum(shape)), shape).astype(dtype)


def copy_speed(size: int) -> float:
    """Bytes read and written per second, of a large array."""
    x = draw(size)
    return 2 * x.nbytes / (1e-3 * milliseconds(jax.jit(lambda x: x + 1), x))


def norm_inputs(batch: int, positions: int, widths: Sequence[int]) -> tuple[Any, Any]:
    """The arguments of a norm's forms behind the first, but for the offset, and a gradient of what they return."""
    parts = tuple(draw(batch, positions, width) for width in widths)
    vectors = [draw(batch, sum(widths), dtype=jnp.float32) for _ in range(2)]
    return (parts, *vectors), (draw(batch, positions, sum(widths)), parts)


def time_norm(form: Callable[..., Any], inputs: Any, gradient: Any) -> str:
    """Milliseconds forward / backward; what went wrong, if it did."""
    settings = Norm(32, 1e-5, True, jnp.dtype(DTYPE))
    try:
        times = both_ways(lambda parts, p, q: form(settings, parts, None, p, q)[:2], inputs, gradient)
    except Exception as error:  # a tile that does not fit
        return one_line(error)[:40]
    return " / ".join(f"{t:.3f}" for t in times)


def norm_row(batch: int, positions: int, widths: Sequence[int], speed: float) -> list[str]:
    """A norm's row of the table."""
    inputs, gradient = norm_inputs(batch, positions, widths)
    cells = [f"{batch} x {positions} x {' + '.join(map(str, widths))}", time_norm(norm.reference, inputs, gradient)]
    cells.append(time_norm(norm.normalise, inputs, gradient) if norm.has_kernel() else "")
    once = 1e3 * gradient[0].nbytes / speed
    return [*cells, f"{2 * once:.3f} / {4 * once:.3f}"]


def tile_row(batch: int, positions: int, widths: Sequence[int], tiles: Sequence[tuple[int, int, int]]) -> list[str]:
    """A norm's row of the table of ways to cut it."""
    from jaxdiff.models import norm_tiles

    inputs, gradient = norm_inputs(batch, positions, widths)
    cells = [f"{batch} x {positions} x {' + '.join(map(str, widths))}"]
    for tile, channels, elements in tiles:
        cut = norm_tiles.Tuning(tile, elements, channels)
        norm_tiles.tuning = lambda *shape, cut=cut: cut
        cells.append(time_norm(norm.normalise, inputs, gradient))
    return cells


def product_row(batch: int, positions: int, widths: Sequence[int], features: int, speed: float) -> list[str]:
    """The row of a sum of products in the table; "fast" is empty where it has one form."""
    parts = tuple(draw(batch, positions, width) for width in widths)
    kernels, gradient = tuple(draw(width, features) for width in widths), draw(batch, positions, features)

    def time_form(form: Callable[..., Any]) -> str:
        return " / ".join(f"{t:.3f}" for t in both_ways(form, (parts, kernels), gradient))

    fast = functools.partial(products.multiply, False)
    inputs, once = sum(part.nbytes for part in parts), gradient.nbytes
    # Backward, the gradient is read, and the parts, of which as many are written.
    traffic = [1e3 * size / speed for size in (inputs + once, 2 * inputs + once)]
    return [
        f"{batch} x {positions} x {' + '.join(map(str, widths))} to {features}",
        time_form(products.reference),
        time_form(fast) if products.has_kernel(parts, features) else "",
        " / ".join(f"{t:.3f}" for t in traffic),
    ]


def added_row(batch: int, side: int, channels: int, features: int, widths: Sequence[int] | None) -> list[str]:
    """The row of a convolution with what is added to it, a bias too; of None nothing at all."""
    x, kernel = draw(batch, side, side, channels), draw(3, 3, channels, features) / 3 / channels**0.5
    bias = None if widths is None else draw(features, dtype=jnp.float32)
    residual = draw(batch, side, side, features) if widths == () else None
    parts = tuple(draw(batch, side, side, width) for width in widths or ())
    inputs = x, kernel, bias, residual, parts, tuple(draw(width, features) / width**0.5 for width in widths or ())
    gradient = draw(batch, side, side, features)

    def form(of_kernel: bool) -> Callable[..., Any]:
        return (lambda *a: convolutions.convolve_add(*a)[0]) if of_kernel else convolutions.reference

    def results(function: Callable[..., Any], dtype: Any) -> Any:
        def compute(inputs: Any, gradient: jax.Array) -> Any:
            wide = jax.tree.map(lambda a: a.astype(dtype) if a.dtype == DTYPE else a, (inputs, gradient))
            y, backward = jax.vjp(function, *wide[0])
            return jax.tree.leaves((y, backward(wide[1])))

        return jax.jit(compute)(inputs, gradient)

    with jax.default_matmul_precision("highest"):
        exact = results(convolutions.reference, jnp.float32)

    def distance(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.mean(jnp.square(a.astype(jnp.float32) - b)) / jnp.mean(jnp.square(b)))

    times, far = [], []
    for own in [False, *([True] if convolutions.has_kernel(x, features) else [])]:
        times.append(" / ".join(f"{t:.3f}" for t in both_ways(form(own), inputs, gradient)))
        found = results(form(own), DTYPE)
        far.append(f"{max(float(distance(a, b)) for a, b in zip(found, exact, strict=True)):.1e}")
    added = {None: "", (): ", bias and residual"}.get(widths, f", bias and {' + '.join(map(str, widths or ()))}")
    name = f"{batch} x {side} x {side} x {channels} to {features}{added}"
    return [name, *times, *[""] * (2 - len(times)), " / ".join(far)]


def convolution_row(form: str, shape: tuple[int, ...], features: int) -> list[str]:
    """A convolution's row of the table."""
    x, kernel = draw(*shape), draw(3, 3, shape[-1], features, dtype=jnp.float32)
    fast, plain = FORMS[form]
    result = jax.eval_shape(plain, x, kernel)
    gradient = draw(*result.shape, dtype=result.dtype)
    times = [both_ways(function, (x, kernel), gradient) for function in (plain, fast)]
    name = {"up": "upsampled by 2", "few": "float32"}[form]
    return [f"{' x '.join(map(str, shape))} to {features}, {name}", *(f"{a:.3f} / {b:.3f}" for a, b in times)]


def attention_row(batch: int, positions: int, heads: int) -> list[str]:
    """Attention's row of the table, "plain" by cuDNN on a GPU; "fast" is empty where it has no kernels of ours."""
    inputs = [jnp.roll(draw(batch, positions, heads, 64), i, axis=0) for i in range(4)]
    on_gpu = jax.default_backend() == "gpu"
    plain = functools.partial(jax.nn.dot_product_attention, implementation="cudnn" if on_gpu else "xla")
    own = attention.attention_kernel(DTYPE, 64, positions, positions) == "ours"
    forms = [plain, *([functools.partial(attention.attend_by_tiles, False)] if own else [])]
    times = [" / ".join(f"{t:.3f}" for t in both_ways(form, inputs[:3], inputs[3])) for form in forms]
    return [f"{batch} x {positions} x {heads} heads of 64", *times, *[""] * (2 - len(times))]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--tiles", default="", help="ELEMENTSxCHANNELSxELEMENTS_OF_A_THREAD, commas between: these alone"
    )
    args = parser.parse_args(argv)
    if args.tiles:
        if not norm.has_kernel():
            parser.error(f"--tiles={args.tiles}: needs a GPU whose norms are kernels of ours")
        tiles = [tuple(map(int, tile.split("x"))) for tile in args.tiles.split(",")]
        columns = ("forward / backward, ms", *args.tiles.split(","))
        print(markdown(columns, [tile_row(*shape, tiles) for shape in NORMS]))
        return
    works = NORMS, PRODUCTS, ADDED, CONVOLUTIONS, ATTENTION
    if args.tiny:
        added = [(2, 4, 8, 8, None), (2, 4, 8, 8, ()), (2, 4, 8, 8, (8, 4))]
        works = [(2, 64, (64,))], [(2, 64, (64, 32), 128)], added, [("up", (2, 4, 4, 8), 8)], [(2, 64, 1)]
    norms, sums, with_added, others, attentions = works
    speed = copy_speed(2**16 if args.tiny else 2**27)
    print(f"{jax.devices()[0].device_kind}: a copy reads and writes {speed / 1e12:.2f} TB/s\n")
    rows = [norm_row(*shape, speed) for shape in norms]
    print(markdown(("GroupNorm and SiLU, forward / backward", "plain, ms", "fast, ms", "traffic, ms"), rows), "\n")
    rows = [product_row(*shape, speed) for shape in sums]
    print(markdown(("Sum of products, forward / backward", "plain, ms", "fast, ms", "traffic, ms"), rows), "\n")
    rows = [added_row(*shape) for shape in with_added]
    columns = ("3x3 convolution, forward / backward", "plain, ms", "fast, ms", "from float32, plain / fast")
    print(markdown(columns, rows), "\n")
    rows = [convolution_row(*shape) for shape in others]
    print(markdown(("3x3 convolution, forward / backward", "plain, ms", "fast, ms"), rows), "\n")
    rows = [attention_row(*shape) for shape in attentions]
    print(markdown(("Attention, forward / backward", "plain, ms", "fast, ms"), rows))


if __name__ == "__main__":
    main()
