"""A small workdir with all the files that a run leaves, without a run: tiny images, the same every time."""

import json
import pathlib

import numpy as np

from jaxdiff import images
from jaxdiff.config import files
from jaxdiff.training.environment import record_compilation
from tests.tiny import tiny_config

SIZE = 16
CLASSES = ("robin", "<i>tulip</i> & co", "7")
STEPS = (100, 200, 300, 400)
HOSTILE = "<img src=x onerror=alert(1)>"  # a name of a folder
EXTRACTOR = "effnet_lite0"


def pictures(count: int, seed: int) -> np.ndarray:
    """uint8 [count, SIZE, SIZE, 3]: slopes of colour, no two alike."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 1, SIZE)[None, :, None, None] * rng.uniform(size=(count, 1, SIZE, 3))
    return (255 * np.clip(slope + 0.1 * rng.uniform(size=slope.shape), 0, 1)).astype(np.uint8)


def sheet(seed: int, count: int = 6) -> np.ndarray:
    """A grid of 3 columns."""
    return images.grid(pictures(count, seed), 3)


def record(sampler: str, steps: int, w: float, picture: str = "") -> dict:
    """A record of scores.json as the evaluation writes it; its FD is at the floor at w = 1.5 and 20 steps."""
    fd = 18.1 if (steps, w) == (20, 1.5) else 20 + 30 / steps + abs(w - 1.5)
    return {
        "scores": {
            f"fd_{EXTRACTOR}": fd,
            f"kid_{EXTRACTOR}": 0.002,
            f"kid_low_{EXTRACTOR}": 0.001,
            f"kid_high_{EXTRACTOR}": 0.003,
            "knn_accuracy": 0.91,
            "knn_accuracy_real": 0.98,
        },
        "floor": {f"fd_{EXTRACTOR}": 18.0},
        "protocol": {
            "images": "samples",
            "num": 1000,
            "labels": "uniform per class",
            "reference": {"name": "val", "num": 297, "sha256": "ab" * 32},
            "floor": {"name": "train", "num": 1000},
            "extractor": {"name": EXTRACTOR, "weights_sha256": "cd" * 32, "resize": "bicubic"},
            "step": STEPS[-1],
            "weights": "ema",
            "ema_decay": 0.99,
            "sampler": sampler,
            "steps": steps,
            "spacing": "leading",
            "eta": 0.0,
            "guidance": w,
            "seed": 0,
            "dtype": "float32",
        },
        "seconds": {"compile": 12.1, "sampling": 0.25 * steps, "features": 5.0, "scores": 0.2},
        "device": "1 x cpu",
        "pictures": {"samples": picture} if picture else {},
    }


def write_lines(path: pathlib.Path, lines: list[dict], torn: str = "") -> None:
    """One JSON object a line, and what is left of a last one."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)


def metrics(stage: str, count: int = 60, shift: float = 0.1) -> list[dict]:
    """Train lines with a loss that is null once, and a validation line every 15."""
    lines = []
    for k in range(1, count + 1):
        at = {"step": k * STEPS[-1] // count, "stage": stage, "images": k * 64}
        loss = None if k == 7 else shift + 2.0 / k + 0.01 * (k % 3)
        lines.append(
            {**at, "loss": loss, "grad_norm": 1 / k, "lr": 1e-3, "images_per_second": 400.0 + k % 5, "mfu": 0.3}
        )
        if k % 15 == 0:
            lines.append({**at, "val_loss": 0.1 + 1 / k})
    return lines


def make_autoencoder(workdir: pathlib.Path) -> pathlib.Path:
    """The workdir of an autoencoder."""
    (workdir / "samples").mkdir(parents=True)
    files.save(tiny_config("vae"), workdir / "config.json")
    write_lines(workdir / "metrics.jsonl", metrics("autoencoder", 8))
    for step in STEPS[:2]:
        path = workdir / "samples" / f"autoencoder-{step:07d}-raw-ema.png"
        images.save_png(path, images.side_by_side(sheet(step), sheet(step + 1)))
    scores = {"val_psnr": 27.3, "val_ssim": 0.88, "rfd_effnet_lite0": 39.7, "rfd_images": 297}
    files.write_json(workdir / "scores.json", {"validation": scores})
    return workdir


def make_run(workdir: pathlib.Path, *, seed: int = 0, lr: float = 1e-3) -> pathlib.Path:
    """The workdir of latent diffusion, with its autoencoder inside."""
    samples = workdir / "samples"
    samples.mkdir(parents=True)
    config = tiny_config("ldm")
    config.update(lr=lr, steps=STEPS[-1])
    files.save(config, workdir / "config.json")
    write_lines(
        workdir / "metrics.jsonl", metrics("diffusion", shift=0.1 + seed / 100), torn='{"step": 401, "stage": "diff'
    )
    for step in STEPS:
        raw, ema = sheet(seed + step), sheet(seed + step + 1)
        images.save_png(samples / f"diffusion-{step:07d}-raw-ema.png", images.side_by_side(raw, ema))
    final, labels = pictures(12, seed + 1), np.arange(12) % len(CLASSES)
    images.save_png(samples / "final.png", images.grid(final, 3))
    np.savez(samples / "final.npz", arr_0=final, arr_1=labels)
    files.write_json(samples / "final.json", config.sample.to_dict())
    np.savez(samples / "real.npz", arr_0=pictures(9, seed + 2), arr_1=np.arange(9) % 3, class_names=np.array(CLASSES))
    images.save_png(samples / "neighbours.png", sheet(seed + 3))
    strip = np.stack([pictures(2, seed + 10 + k) for k in range(5)])
    np.savez(samples / "denoising.npz", t=np.array([999, 700, 400, 100, 0]), x_t=strip, x0=strip[::-1], labels=[0, 1])
    records = []
    for k, (sampler, steps, w) in enumerate((s, n, w) for s in ("ddim", "ddpm") for n in (5, 20) for w in (0.0, 1.5)):
        images.save_png(samples / f"eval-{k}.png", sheet(seed + 20 + k))
        records.append(record(sampler, steps, w, f"samples/eval-{k}.png"))
    files.write_json(
        workdir / "scores.json", {"validation": {"val_loss": 0.117, "val_images": 297}, "records": records}
    )
    command = "python -m jaxdiff.main --config=configs/ldm_cfg.py --workdir='</script><script>alert(1)</script>'"
    start = {"time": "2025-11-24T09:12:44", "command": command, "python": "3.11.7", "packages": {"jax": "0.10.2"}}
    start |= {"device": "1 x cpu", "mode": "train"}
    write_lines(workdir / "starts.jsonl", [start])
    record_compilation(workdir, "autoencoder", 12.3)
    record_compilation(workdir, "diffusion", 72.1)
    meta = {"class_names": list(CLASSES), "autoencoder": "autoencoder", "data": {"batches": STEPS[-1], "images": 1500}}
    folder = workdir / "checkpoints" / str(STEPS[-1]) / "meta"
    folder.mkdir(parents=True)
    files.write_json(folder / "metadata", meta)
    make_autoencoder(workdir / "autoencoder")
    return workdir
