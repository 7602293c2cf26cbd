"""Pictures as data URIs, within a budget of bytes."""

import base64
import io
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image


class Level(NamedTuple):
    """How many pictures are kept, and how well."""

    frames: int  # pictures of a slider
    each: int  # images of a class
    width: int  # pixels above which a picture is made smaller
    lossless: int  # bytes up to which it is kept without loss
    quality: int  # of WebP otherwise


# Tried in this order until everything fits.
LEVELS = (
    Level(frames=16, each=10, width=2600, lossless=200_000, quality=92),
    Level(frames=10, each=10, width=2000, lossless=40_000, quality=85),
    Level(frames=6, each=6, width=1400, lossless=10_000, quality=75),
    Level(frames=4, each=4, width=1000, lossless=0, quality=60),
)
CRISP = 420  # pixels of width up to which a picture may be shown at twice its size, its pixels as squares


class Picture(NamedTuple):
    """A picture for the template."""

    src: str  # data URI
    width: int  # pixels as they are
    height: int
    alt: str

    @property
    def shown(self) -> int:
        """Width in CSS pixels, where there is room."""
        return self.width * (2 if self.width <= CRISP else 1)


class OverBudgetError(Exception):
    """The pictures do not fit; those of the next level may."""


class Album:
    """Encodes pictures and counts their bytes.

    Args:
        level: How many and how well.
        budget: Bytes that all data URIs may have together.
        strict: Whether more is an OverBudgetError; else what is too much is left out, and counted.
    """

    def __init__(self, level: Level, budget: int, strict: bool = False) -> None:
        self.level, self.budget, self.strict = level, budget, strict
        self.spent = self.left_out = self.unreadable = self.reduced = 0
        self.thinned: list[str] = []  # what has fewer pictures than there are

    def add(self, image: UInt8[np.ndarray, "h w 3"] | pathlib.Path, alt: str) -> Picture | None:
        """One picture, from pixels or a file; None where it cannot be read, or nothing is left of the budget."""
        try:
            picture = Image.open(image) if isinstance(image, pathlib.Path) else Image.fromarray(np.asarray(image))
            picture = picture.convert("RGB")
        except (OSError, ValueError, TypeError, SyntaxError):  # half written, or no picture at all
            self.unreadable += 1
            return None
        if large := picture.width > self.level.width:
            height = max(1, round(picture.height * self.level.width / picture.width))
            picture = picture.resize((self.level.width, height), Image.Resampling.LANCZOS)
        src, exact = self._encode(picture)
        if self.spent + len(src) > self.budget:
            if self.strict:
                raise OverBudgetError
            self.left_out += 1
            return None
        self.spent += len(src)
        self.reduced += large or not exact
        return Picture(src, *picture.size, alt)

    def frames(self, items: Sequence[Any], what: str) -> list[Any]:
        """As many of `items` as a slider gets, evenly, the first and the last among them."""
        chosen = evenly(items, self.level.frames)
        if len(chosen) < len(items):
            self.thinned.append(f"{what}: {len(chosen)} of {len(items)}")
        return chosen

    def notes(self) -> list[str]:
        """What was reduced or left out, in sentences."""
        notes = (
            [f"Evenly chosen, the first and the last among them: {'; '.join(self.thinned)}."] if self.thinned else []
        )
        if self.reduced:
            how = f"WebP of quality {self.level.quality}, at most {self.level.width:,} pixels wide"
            notes.append(f"{self.reduced} large pictures are kept with loss ({how}), the others without.")
        if self.left_out:
            notes.append(f"{self.left_out} pictures are left out: the report would be too large.")
        if self.unreadable:
            notes.append(f"{self.unreadable} pictures could not be read.")
        return notes

    def _encode(self, picture: Image.Image) -> tuple[str, bool]:
        """The data URI, and whether it is without loss: then the smaller of WebP and PNG."""
        lossy = _bytes(picture, "webp", quality=self.level.quality)
        tried = {}
        if 3 * len(lossy) <= self.level.lossless:  # more will not fit, and takes long to try
            tried["webp"] = _bytes(picture, "webp", lossless=True)
            if len(lossy) < 20_000:  # where PNG has a chance
                tried["png"] = _bytes(picture, "png", optimize=True)
        kind = min(tried, key=lambda kind: len(tried[kind]), default="")
        exact = bool(kind) and len(tried[kind]) <= self.level.lossless
        kind, data = (kind, tried[kind]) if exact else ("webp", lossy)
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", exact


def _bytes(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` (2 or more) of `items` at even distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[k] for k in np.linspace(0, len(items) - 1, most).round().astype(int)]


def halves(path: pathlib.Path, gap: int = 16) -> list[UInt8[np.ndarray, "h w 3"]]:
    """The two sheets that `images.side_by_side` put together in a file, or the whole where it is no such picture.

    Raises: OSError where the file cannot be read.
    """
    with Image.open(path) as file:
        sheet = np.asarray(file.convert("RGB"))
    width = (sheet.shape[1] - gap) // 2
    if width < 1 or sheet.shape[1] % 2 or (sheet[:, width : width + gap] != 255).any():
        return [sheet]
    return [sheet[:, :width], sheet[:, width + gap :]]


def cells(sheet: UInt8[np.ndarray, "H W 3"], size: int, gap: int = 2) -> UInt8[np.ndarray, "n h w 3"] | None:
    """The places row by row of a grid that `images.grid` made of images of `size` pixels, the last ones of which may be
    white; None where it is no such grid."""
    height, width = sheet.shape[:2]
    if (height + gap) % (size + gap) or (width + gap) % (size + gap):
        return None
    tops, lefts = range(0, height, size + gap), range(0, width, size + gap)
    return np.stack([sheet[top : top + size, left : left + size] for top in tops for left in lefts])
