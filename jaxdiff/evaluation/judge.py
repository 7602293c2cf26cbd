"""Scores of a set of images against a data set, with the same scores of real images, and how they were measured."""

from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from jaxdiff.clock import Stopwatch
from jaxdiff.config.require import require
from jaxdiff.data.sources import Source, array_source
from jaxdiff.errors import ConfigError
from jaxdiff.evaluation.extractors import EXTRACTORS, Extractor, scored_name
from jaxdiff.evaluation.records import Record
from jaxdiff.evaluation.scores import FEATURE_SCORES, IMAGE_SCORES, Compared, Scores
from jaxdiff.evaluation.sets import ImageSet, Subset

FLOOR = 3  # stream of the seeded generator; jaxdiff.data.pipeline and evaluation.kernel_distance have the others
FULL = 50_000  # images that the field's published numbers are measured with


class Judge:
    """Scores images by the config fields `eval`; features of real images are computed once, and kept on disk.

    Args: extractor, in place of the one that `settings.extractor` names.
    """

    def __init__(
        self, settings: ConfigDict, train: Source, val: Source, mesh: Mesh, extractor: Extractor | None = None
    ) -> None:
        self.settings, self.mesh = settings, mesh
        self._train, self._val = train, val
        self._names = [name for name in settings.scores if name in FEATURE_SCORES]
        self._floors: dict[int, Scores] = {}
        self.judged: ImageSet | None = None  # the images of the last call
        if self._names or settings.neighbours:
            self.extractor = extractor or EXTRACTORS[settings.extractor](settings)
            sources = {"train": train, "val": val}
            self._real = {name: self.image_set(source, f"{name} images") for name, source in sources.items()}

    @property
    def train_set(self) -> ImageSet:
        """The training images."""
        return self._real["train"]

    def image_set(self, source: Source, name: str, *, cached: bool = True) -> ImageSet:
        """The images of a source, with the features that the scores ask for."""
        spatial = "sfd" in self._names
        return ImageSet(source, self.extractor, self.mesh, name, spatial=spatial, cached=cached)

    def check(self, num: int, given: str = "") -> None:
        """ConfigError where `num` images, or those that they are compared with, are fewer than a score needs.

        Args: given, the file or folder that they are from, where they are not to be drawn.
        """
        for name in self._names:
            least = FEATURE_SCORES[name].least(self.settings)
            if given:
                allowed = f"at least {least} images for the score {name!r}; these are {num}"
                require(num >= least, "eval.images", given, allowed)
            require(num >= least, "eval.num", num, f"at least {least} for the score {name!r}")
            split = self.settings.reference
            there = len(self._real[split])
            allowed = f"a set of at least {least} images for the score {name!r}; these are {there}"
            require(there >= least, "eval.reference", split, allowed)

    def __call__(
        self,
        images: UInt8[np.ndarray, "n h w 3"],
        labels: Int[np.ndarray, " n"] | None,
        protocol: dict[str, Any],
        watch: Stopwatch,
    ) -> Record:
        """The record, all but its pictures, of some images; `protocol` says what they are.

        Raises: ConfigError for too few images, for labels that a score needs and that there are not, or for features
        that are not finite.
        """
        given = protocol.get("images", "samples")
        self.check(len(images), "" if given == "samples" else given)
        source = array_source(images, np.zeros(len(images), np.int32) if labels is None else labels, ())
        self.judged = None
        if self._names or self.settings.neighbours:
            self.judged = self.image_set(source, "images", cached=False)
        scores, floor = self._of_features(self.judged, watch) if self._names else ({}, {})
        with watch.part("scores"):
            for name in self.settings.scores:
                if name in IMAGE_SCORES:
                    if labels is None:
                        raise ConfigError(f"eval.scores = {name!r}: needs labels, which these images do not have")
                    scores |= IMAGE_SCORES[name](images, labels, self._train, self._val)
        device = self.mesh.devices.flat[0].device_kind
        return {
            "scores": scores,
            "floor": floor,
            "protocol": self.protocol(len(images), protocol),
            "seconds": watch.seconds,
            "device": f"{self.mesh.size} x {device}",
            "pictures": {},
        }

    def protocol(self, num: int, images: dict[str, Any]) -> dict[str, Any]:
        """The protocol of a record of `num` images, which `images` says what they are; nothing is computed."""
        if not self._names:
            return {"num": num, **images}
        e, x = self.settings, self.extractor
        reference, (floor_set, _) = self._real[e.reference], self._floor_sets(num)
        return {
            "num": num,
            **images,
            "reference": {"name": e.reference, "num": len(reference), "sha256": reference.source.checksum},
            "floor": {"name": floor_set.name.split()[0], "num": len(floor_set)},
            "extractor": {"name": x.name, "weights": x.weights, "resize": x.resize},
            **({"k": e.k} if "precision_recall" in self._names else {}),
            **({"splits": e.splits} if "is" in self._names else {}),
        }

    def _of_features(self, judged: Any, watch: Stopwatch) -> tuple[Scores, Scores]:
        e = self.settings
        reference = self._real[e.reference]
        with watch.part("features"):
            _ = judged.features
        with watch.part("features of real images"):
            _ = reference.features
            floor_set, of_val = self._floor_sets(len(judged))
            if "nearest_train" in self._names:
                _ = self._real["train"].features, of_val.features
            _ = floor_set.features
        with watch.part("scores"):
            if len(judged) not in self._floors:
                floor: Scores = {}
                for name in self._names:
                    own = of_val if FEATURE_SCORES[name].floor_of_val else floor_set
                    if len(own) >= FEATURE_SCORES[name].least(e):
                        floor |= self._score(name, own)
                self._floors[len(judged)] = floor
            scores: Scores = {}
            for name in self._names:
                scores |= self._score(name, judged)
        return scores, self._floors[len(judged)]

    def _score(self, name: str, judged: ImageSet) -> Scores:
        e = self.settings
        compared = Compared(judged, self._real[e.reference], self._real["train"], e, self.mesh)
        scores = FEATURE_SCORES[name].function(compared)
        scores = {scored_name(score, self.extractor): value for score, value in scores.items()}
        full = len(judged) == FULL
        return {f"{n}_50k" if full and n in ("fid", "sfid") else n: value for n, value in scores.items()}

    def _floor_sets(self, num: int) -> tuple[ImageSet, ImageSet]:
        """As many real images as are judged, drawn once and for all, or all where there are fewer: of the split that
        is not the reference; and of the validation images."""

        def some(name: str) -> ImageSet:
            real = self._real[name]
            if len(real) <= num:
                return real
            rows = np.random.default_rng((0, FLOOR)).permutation(len(real))[:num]
            return self.image_set(Subset(real.source, np.sort(rows)), real.name)

        return some("train" if self.settings.reference == "val" else "val"), some("val")
