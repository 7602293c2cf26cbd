"""How fast images come: this project's loader beside torch's DataLoader and tf.data, on the same files and cores.

    python -m benchmarks.data                            # JPEGs of 128x128 drawn for the purpose
    python -m benchmarks.data --path=FOLDER --size=128   # a class folder of yours
    taskset -c 0 python -m benchmarks.data               # on one core

Every loader decodes each JPEG, resizes its short side to `size` and crops the centre where it is not of that size
already, mirrors half of the images, and hands out shuffled batches of uint8. The loaders take turns, `rounds` times;
printed are medians, and written to --json if that is given. Those that are not installed are left out.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxdiff import images
from jaxdiff.config import fields
from jaxdiff.data import load_source, train_batches
from jaxdiff.data.prepare import cores, prepare

BATCH = 128
SEED = 0


def draw_images(root: pathlib.Path, size: int, count: int) -> None:
    """A class folder of `count` smooth random JPEGs (quality 90), of about the size of natural ones."""
    rng = np.random.default_rng(0)
    for k in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (size // 4, size // 4, 3), np.uint8))
        folder = root / ("val" if k % 100 == 0 else "train") / f"class{k % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{k}.jpg", quality=90)


def ours(path: pathlib.Path, prepared: pathlib.Path | None, args: argparse.Namespace) -> Callable[[], Iterator[int]]:
    """Batches of `train_batches` on a folder, or on its prepared records; mirrored by the compiled function that
    training does it with, here on the same cores."""
    data = fields.base("ddpm", "folder").data
    data.update(path=str(path), image_size=args.size, threads=args.threads, workers=args.workers, cache_gb=0.0)
    if prepared is not None:
        data.prepared = str(prepared)
    source = load_source(data, "train")
    mirror = jax.jit(images.mirrored)

    def run() -> Iterator[int]:
        batches = train_batches(
            source,
            seed=SEED,
            batch_size=BATCH,
            start=0,
            stop=10**9,
            flip=True,
            threads=args.threads,
            workers=args.workers,
        )
        pending = None
        for batch in batches:
            result = mirror(batch) if args.mirror else batch["image"]
            if pending is not None:
                jax.block_until_ready(pending)
            pending = result
            yield len(result)

    return run


def torch_loader(path: pathlib.Path, args: argparse.Namespace) -> Callable[[], Iterator[int]]:
    """torch.utils.data.DataLoader with torchvision's own JPEG decoder and transforms, a worker a core."""
    import torch
    import torchvision
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    steps: list[Any] = [v2.RandomHorizontalFlip()]
    if not args.same_size:
        steps = [v2.Resize(args.size, antialias=True), v2.CenterCrop(args.size), *steps]

    def decode(file: str) -> Any:
        return torchvision.io.decode_image(file, mode=torchvision.io.ImageReadMode.RGB)

    dataset = torchvision.datasets.ImageFolder(str(path / "train"), v2.Compose(steps), loader=decode)

    def run() -> Iterator[int]:
        loader = torch.utils.data.DataLoader(
            dataset, BATCH, shuffle=True, num_workers=args.torch_workers, drop_last=True, persistent_workers=True
        )
        while True:
            for image, _ in loader:
                yield len(image)

    return run


def tf_loader(path: pathlib.Path, args: argparse.Namespace) -> Callable[[], Iterator[int]]:
    """tf.data with parallel reading and decoding left to AUTOTUNE."""
    import tensorflow as tf

    folders = sorted(p for p in (path / "train").iterdir() if p.is_dir())
    files = [(str(f), k) for k, folder in enumerate(folders) for f in sorted(folder.iterdir())]

    def read(file: Any, label: Any) -> Any:
        image = tf.io.decode_jpeg(tf.io.read_file(file), channels=3)
        if not args.same_size:
            shape = tf.shape(image)[:2]
            scaled = tf.cast(
                tf.round(tf.cast(shape, tf.float32) * args.size / tf.cast(tf.reduce_min(shape), tf.float32)), tf.int32
            )
            image = tf.image.resize(image, scaled, antialias=True)
            image = tf.cast(tf.image.resize_with_crop_or_pad(image, args.size, args.size), tf.uint8)
        return tf.image.random_flip_left_right(tf.ensure_shape(image, (args.size, args.size, 3))), label

    def run() -> Iterator[int]:
        dataset = tf.data.Dataset.from_tensor_slices(([f for f, _ in files], [k for _, k in files]))
        dataset = dataset.shuffle(len(files), seed=SEED).repeat().map(read, num_parallel_calls=tf.data.AUTOTUNE)
        for image, _ in dataset.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
            yield len(image)

    return run


def rate(batches: Iterator[int], seconds: float) -> float:
    """Images/s over `seconds`, after as many batches as fill the buffers."""
    for _ in range(10):
        next(batches)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        count += next(batches)
    return count / (time.perf_counter() - begin)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--path", type=pathlib.Path, help="class folder of JPEGs; default: images drawn for the purpose"
    )
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--count", type=int, default=6000, help="images drawn")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--torch_workers", type=int, default=cores())
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mirror", type=int, default=1, help="0: leave it to the training step, as training does")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = args.path
        if path is None:
            path = pathlib.Path(scratch) / "drawn"
            draw_images(path, args.size, args.count)
        first = next(iter((path / "train").glob("*/*")))
        args.same_size = Image.open(first).size == (args.size, args.size)
        data = fields.base("ddpm", "folder").data
        data.update(path=str(path), image_size=args.size, prepared=str(pathlib.Path(scratch) / "prepared"))
        prepared, manifest = prepare(data)
        loaders = {
            "jaxdiff, JPEG files": ours(path, None, args),
            "jaxdiff, prepared": ours(path, prepared, args),
        }
        if importlib.util.find_spec("torchvision"):
            loaders[f"torch DataLoader, {args.torch_workers} workers"] = torch_loader(path, args)
        if importlib.util.find_spec("tensorflow"):
            loaders["tf.data"] = tf_loader(path, args)
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        turns = tqdm([name for _ in range(args.rounds) for name in loaders], file=sys.stderr)
        for name in turns:
            rates[name].append(rate(loaders[name](), args.seconds))
    packages = ("jax", "grain", "simplejpeg", "torch", "torchvision", "tensorflow-cpu", "tensorflow")
    versions = {p: importlib.metadata.version(p) for p in packages if _installed(p)}
    size = sum(f.stat().st_size for f in (path / "train").rglob("*.*")) if path.exists() else 0
    result = {
        "cores": cores(),
        "size": args.size,
        "images": manifest["images"]["train"],
        "bytes_per_file": size / manifest["images"]["train"],
        "batch": BATCH,
        "images_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "all_rounds": rates,
        "versions": versions,
        "command": " ".join(sys.argv),
    }
    print(
        f"{cores()} cores, {manifest['images']['train']:,} JPEGs, {args.size}x{args.size}, batch {BATCH}, median of {args.rounds}"
    )
    for name, value in result["images_per_second"].items():
        low, high = min(rates[name]), max(rates[name])
        print(f"{name:32} {value:8,.0f} images/s  ({low:,.0f} to {high:,.0f})")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
