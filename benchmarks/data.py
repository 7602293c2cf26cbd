"""How fast images come: this project's loader beside torch's DataLoader and tf.data, on the same files and cores.

    python -m benchmarks.data                            # JPEGs of 128x128 drawn for the purpose
    python -m benchmarks.data --path=FOLDER --size=128   # a class folder of yours
    taskset -c 0 python -m benchmarks.data               # on one core

Every loader decodes each JPEG, resizes its short side to `size` and crops the centre where it is not of that size
already, mirrors half of the images, and hands out shuffled batches of uint8. They take turns, each in a process of
its own; medians of the rounds are printed, and written to --json if that is given. What is not installed is left out:

    pip install torch torchvision tensorflow-cpu
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
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


def ours(args: argparse.Namespace, data: dict[str, Any]) -> Iterator[int]:
    """Batches of `train_batches`, mirrored by the compiled function that training does it with, on the same cores."""
    config = data_config(args, **{"threads": args.threads, "workers": args.workers, "cache_gb": 0.0, **data})
    options = {"seed": SEED, "batch_size": BATCH, "flip": True, "threads": args.threads, "workers": args.workers}
    batches = train_batches(load_source(config, "train"), start=0, stop=10**9, **options)
    mirror = jax.jit(images.mirrored)
    pending = None
    for batch in batches:
        result = mirror(batch)
        if pending is not None:
            pending.block_until_ready()
        pending = result
        yield len(result)


def files_loader(args: argparse.Namespace) -> Iterator[int]:
    """This project's, decoding files."""
    return ours(args, {"prepared": str(args.scratch / "none")})


def records_loader(args: argparse.Namespace) -> Iterator[int]:
    """This project's, from records of --mode=prepare."""
    return ours(args, {"prepared": str(args.scratch / "prepared")})


def memory_loader(args: argparse.Namespace) -> Iterator[int]:
    """This project's, from those records kept in memory, as up to `data.cache_gb` they are."""
    return ours(args, {"prepared": str(args.scratch / "prepared"), "cache_gb": 1e9})


def torch_loader(args: argparse.Namespace) -> Iterator[int]:
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

    dataset = torchvision.datasets.ImageFolder(str(args.path / "train"), v2.Compose(steps), loader=decode)
    options = {"num_workers": args.torch_workers, "drop_last": True, "persistent_workers": args.torch_workers > 0}
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, **options)
    while True:
        for image, _ in loader:
            yield len(image)


def tf_loader(args: argparse.Namespace) -> Iterator[int]:
    """tf.data with parallel reading and decoding left to AUTOTUNE."""
    import tensorflow as tf

    folders = sorted(p for p in (args.path / "train").iterdir() if p.is_dir())
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

    dataset = tf.data.Dataset.from_tensor_slices(([f for f, _ in files], [k for _, k in files]))
    dataset = dataset.shuffle(len(files), seed=SEED).repeat().map(read, num_parallel_calls=tf.data.AUTOTUNE)
    for image, _ in dataset.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE).as_numpy_iterator():
        yield len(image)


LOADERS: dict[str, tuple[str, Callable[[argparse.Namespace], Iterator[int]], str]] = {
    "files": ("jaxdiff, JPEG files", files_loader, "jaxdiff"),
    "records": ("jaxdiff, prepared records", records_loader, "jaxdiff"),
    "memory": ("jaxdiff, records in memory", memory_loader, "jaxdiff"),
    "torch": ("torch DataLoader, torchvision", torch_loader, "torchvision"),
    "tf": ("tf.data", tf_loader, "tensorflow"),
}


def data_config(args: argparse.Namespace, **changes: Any) -> Any:
    """The config fields `data` of the measured folder."""
    data = fields.base("ddpm", "folder").data
    data.update({"path": str(args.path), "image_size": args.size, **changes})
    return data


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
    parser.add_argument("--path", type=pathlib.Path, help="class folder of JPEGs; default: drawn ones")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--count", type=int, default=6000, help="images drawn")
    parser.add_argument("--threads", type=int, default=cores(), help="of jaxdiff")
    parser.add_argument("--workers", type=int, default=0, help="processes of jaxdiff")
    parser.add_argument("--torch_workers", type=int, default=cores(), help="processes of torch")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="file to write the figures to")
    parser.add_argument("--only", choices=LOADERS, help=argparse.SUPPRESS)  # a process of one measurement
    parser.add_argument("--scratch", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        first = next((args.path / "train").glob("*/*"))
        args.same_size = Image.open(first).size == (args.size, args.size)
        print(rate(LOADERS[args.only][1](args), args.seconds), flush=True)
        os._exit(0)  # loaders without an end are not waited for
    with tempfile.TemporaryDirectory() as scratch:
        args.scratch = pathlib.Path(scratch)
        if args.path is None:
            args.path = args.scratch / "drawn"
            draw_images(args.path, args.size, args.count)
        _, manifest = prepare(data_config(args, prepared=str(args.scratch / "prepared")))
        names = [name for name, (_, _, package) in LOADERS.items() if importlib.util.find_spec(package)]
        rates: dict[str, list[float]] = {name: [] for name in names}
        for name in tqdm(names * args.rounds, desc="measuring", mininterval=10):
            rates[name].append(measure_alone(name, args))
        sizes = [file.stat().st_size for file in (args.path / "train").rglob("*.*")]
    report(args, rates, manifest["images"]["train"], statistics.mean(sizes))


def measure_alone(name: str, args: argparse.Namespace) -> float:
    """Images/s of a loader in a new process."""
    fields_ = ("path", "size", "threads", "workers", "torch_workers", "seconds", "scratch")
    flags = [f"--{field}={getattr(args, field)}" for field in fields_]
    command = [sys.executable, "-m", "benchmarks.data", f"--only={name}", *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr}")
    return float(result.stdout.splitlines()[-1])


def report(args: argparse.Namespace, rates: dict[str, list[float]], count: int, file_size: float) -> None:
    """Print the medians, and write all there is to --json."""
    packages = ("jax", "grain", "simplejpeg", "torch", "torchvision", "tensorflow", "tensorflow-cpu")
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    versions = {name: installed[name] for name in packages if name in installed}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{cores()} cores, {count:,} JPEGs of {file_size / 1e3:.1f} kB to {args.size}x{args.size}, batch {BATCH}")
    for name, median in medians.items():
        low, high = min(rates[name]), max(rates[name])
        print(f"{LOADERS[name][0]:30} {median:8,.0f} images/s  ({low:,.0f} to {high:,.0f} in {args.rounds} rounds)")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if args.json:
        result = {"cores": cores(), "images": count, "bytes_per_file": file_size, "size": args.size, "batch": BATCH}
        result |= {"images_per_second": medians, "rounds": rates, "versions": versions, "command": " ".join(sys.argv)}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
