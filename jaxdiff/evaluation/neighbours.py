"""The memorisation check as a picture: samples beside the training images that are nearest to them."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from jaxdiff.data.decode import center_crop
from jaxdiff.data.sources import Source
from jaxdiff.evaluation.judge import Judge
from jaxdiff.evaluation.manifold import nearest

SHOWN = 3  # neighbours of a sample, by features and by pixels
SIDE = 32  # pixels that images are compared at
CAPTION = 14  # height of a line of text


def neighbours_sheet(judge: Judge, samples: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "H W 3"] | None:
    """A row for each of the `eval.neighbours` images, of those that were just judged, that are nearest to a training
    image in features: it, its nearest training images by features, and by pixels, with the distances under them; None
    where none are asked for.

    The distance of features is Euclidean; that of pixels is the root of the mean square, in grey levels, of images
    reduced to 32x32 (less where they are smaller) by averaging.
    """
    count = min(judge.settings.neighbours, len(samples))
    if not count or judge.judged is None:
        return None
    train, mesh = judge.train_set, judge.mesh
    by_features, far = nearest(judge.judged.features.pooled, train.features.pooled, SHOWN, mesh)
    chosen = np.argsort(far[:, 0], kind="stable")[:count]
    by_features, far = by_features[chosen], far[chosen]
    shown = samples[chosen]
    if shown.shape[1:] != (there := train.images(by_features[0, :1])).shape[1:]:  # images of another project
        shown = np.stack([center_crop(Image.fromarray(image), there.shape[1]) for image in shown])
    by_pixels, off = nearest(reduced(shown), _all_reduced(train.source), SHOWN, mesh)
    off = off / np.sqrt(reduced(shown).shape[1])
    rows = [
        _row(image, train.images(f), d, train.images(p), o)
        for image, f, d, p, o in zip(shown, by_features, far, by_pixels, off, strict=True)
    ]
    return np.concatenate([_heading(rows[0].shape[1], shown.shape[2]), *rows])


def reduced(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n d"]:
    """Images averaged over blocks to at most 32x32 pixels, as rows."""
    n, h, w, _ = images.shape
    a, b = max(1, h // SIDE), max(1, w // SIDE)
    cut = images[:, : h // a * a, : w // b * b]
    return cut.reshape(n, h // a, a, w // b, b, 3).mean((2, 4), dtype=np.float32).reshape(n, -1)


def _all_reduced(source: Source, at_once: int = 512) -> Float[np.ndarray, "n d"]:
    parts = (np.arange(first, min(first + at_once, len(source))) for first in range(0, len(source), at_once))
    return np.concatenate([reduced(source.batch(rows)["image"]) for rows in parts])


def _row(
    image: UInt8[np.ndarray, "h w 3"],
    by_features: UInt8[np.ndarray, "k h w 3"],
    far: Float[np.ndarray, " k"],
    by_pixels: UInt8[np.ndarray, "k h w 3"],
    off: Float[np.ndarray, " k"],
) -> UInt8[np.ndarray, "H W 3"]:
    cells = [(image, ""), *((x, f"{d:.3g}") for x, d in zip(by_features, far, strict=True))]
    cells += [(x, f"{o:.3g}") for x, o in zip(by_pixels, off, strict=True)]
    return np.concatenate([_cell(picture, text, gap) for (picture, text), gap in zip(cells, GAPS, strict=True)], axis=1)


GAPS = (0, 12, *[2] * (SHOWN - 1), 12, *[2] * (SHOWN - 1))  # white pixels left of a row's pictures


def _cell(picture: UInt8[np.ndarray, "h w 3"], text: str, gap: int) -> UInt8[np.ndarray, "H W 3"]:
    picture = _enlarged(picture)
    sheet = Image.new("RGB", (picture.shape[1] + gap, picture.shape[0] + CAPTION), "white")
    sheet.paste(Image.fromarray(picture), (gap, 0))
    ImageDraw.Draw(sheet).text((gap, picture.shape[0] + 1), text, "black")
    return np.asarray(sheet)


def _heading(width: int, side: int) -> UInt8[np.ndarray, "H W 3"]:
    side = side * _scale(side)
    sheet = Image.new("RGB", (width, CAPTION + 2), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = (0, side + GAPS[1], side + GAPS[1] + SHOWN * side + sum(GAPS[2 : SHOWN + 2]))
    for left, text in zip(lefts, ("sample", "nearest by features", "nearest by pixels"), strict=True):
        draw.text((left, 1), text, "black")
    return np.asarray(sheet)


def _scale(side: int) -> int:
    return max(1, -(-64 // side))


def _enlarged(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
    scale = _scale(picture.shape[1])
    return np.repeat(np.repeat(picture, scale, 0), scale, 1)
