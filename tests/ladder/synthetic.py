"""Workdirs of a ladder with all the files that the tables are made of, without a ladder."""

import json
import pathlib

import numpy as np

from configs import ladder as preset
from jaxdiff import images
from jaxdiff.config import files
from jaxdiff.ladder.rungs import rung_config

SIZES = {"autoencoder": 32, "ddpm": 16, "ldm": 32}


def record(config, rung, num=300, seconds=10.0, scores=None, step=40, **changed):
    """As --mode=evaluate leaves it."""
    s = {**rung_config(config, rung).sample.to_dict(), **changed}
    fields = ("sampler", "steps", "spacing", "eta", "guidance", "guidance_interval", "guidance_rescale")
    fields += ("autoguidance", "autoguidance_step", "clip", "decode_tile", "weights", "seed")
    protocol = {"num": num, "images": "samples", "step": step, "labels": "all 10 in turn", **{f: s[f] for f in fields}}
    sha256 = {"ddpm": "ab"}.get(rung, "cd") * 32  # of images of another size
    protocol |= {"reference": {"name": "val", "num": 297, "sha256": sha256}, "floor": {"name": "train", "num": num}}
    protocol["extractor"] = {"name": "effnet_lite0", "weights": "package 0.1", "resize": "bilinear"}
    kid = {"kid_effnet_lite0": 0.25, "kid_low_effnet_lite0": 0.125, "kid_high_effnet_lite0": 0.5}
    knn = {"knn_accuracy": 0.875, "knn_accuracy_real": 0.96875}
    return {
        "scores": {"fd_effnet_lite0": 31.5, **kid, **knn, **(scores or {})},
        "floor": {"fd_effnet_lite0": 18.25},
        "protocol": protocol,
        "seconds": {"compile": 2.5, "sampling": seconds},
        "device": "1 x cpu",
        "pictures": {},
    }


def lay(workdir, config, records, rungs=("ddpm",)):
    """A ladder's workdir of which these rungs were decided on, with these records of the rung ddpm."""
    decided = dict(steps=40, limit="budget", recipe=1500, share_seconds=90.0, step_seconds=0.25, compile_seconds=9.0)
    decided |= dict(images=1500, classes=10, device="1 x cpu", train_seconds=60.0, score_seconds=30.0)
    workdir.mkdir(exist_ok=True)
    files.save(config, workdir / "config.json")
    files.write_json(workdir / "ladder.json", {"rungs": {r: {**decided, "image_size": SIZES[r]} for r in rungs}})
    for rung in rungs:
        (workdir / rung).mkdir()
    files.write_json(workdir / "ddpm" / "scores.json", {"validation": {"val_loss": 0.0625}, "records": records})
    start = {"time": "2026-01-02T03:04:05+00:00", "command": "python -m jaxdiff.main --mode=ladder", "python": "3.12.1"}
    start |= {"packages": {"jax": "0.10.2"}, "device": "1 x cpu", "processes": 1}
    (workdir / "starts.jsonl").write_text(json.dumps(start) + "\n")


def shade(line: int, image: int) -> tuple[int, int, int]:
    """The colour of all pixels of an image of `make_ladder`."""
    return 20 + 10 * line, image, 77


def make_ladder(workdir: pathlib.Path) -> pathlib.Path:
    """A ladder that is not at its end: of DDPM, of DDIM at 50 and 100 steps, of latents at w = 0, 1.5 and 2."""
    config = preset.get_config()
    pixels = [record(config, "ddpm")]
    pixels += [record(config, "ddpm", sampler="ddim", steps=n, seconds=s) for n, s in ((50, 4.0), (100, 8.0))]
    latents = [record(config, "ldm", guidance=w) for w in (0.0, 1.5, 2.0)]
    lay(workdir, config, pixels, SIZES)
    for k, (rung, own) in enumerate([*(("ddpm", r) for r in pixels), *(("ldm", r) for r in latents)]):
        side = SIZES[rung]
        sheet = np.array([np.full((side, side, 3), shade(k, image)) for image in range(100)], np.uint8)
        own["pictures"]["samples"] = f"samples/{k}.png"
        images.save_png(workdir / rung / "samples" / f"{k}.png", images.grid(sheet, 10))
    for rung, records in (("ddpm", pixels), ("ldm", latents)):
        own = {"validation": {"val_loss": 0.0625, "val_images": 297}, "records": records}
        files.write_json(workdir / rung / "scores.json", own)
        real = np.full((20, SIZES[rung], SIZES[rung], 3), 250, np.uint8)
        names = np.array([f"digit {k}" for k in range(10)])
        np.savez(workdir / rung / "samples" / "real.npz", arr_0=real, arr_1=np.arange(20) // 2, class_names=names)
    for rung in SIZES:
        files.save(rung_config(config, rung), workdir / rung / "config.json")
    return workdir
