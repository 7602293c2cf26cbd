"""Scores of images. A new one is a function and a line in `FEATURE_SCORES`, or in `IMAGE_SCORES`."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from jaxdiff.data.sources import Source
from jaxdiff.evaluation.frechet import Moments, frechet_distance
from jaxdiff.evaluation.inception_score import inception_score
from jaxdiff.evaluation.kernel_distance import kernel_distance
from jaxdiff.evaluation.manifold import nearest, precision_recall
from jaxdiff.evaluation.sets import ImageSet

Scores = dict[str, float]


class Compared(NamedTuple):
    """What a score of features is computed of: the images that are judged, those they are compared with, and the
    training images; the config fields `eval`, and the devices."""

    judged: ImageSet
    reference: ImageSet
    train: ImageSet
    settings: ConfigDict
    mesh: Mesh


def fd(c: Compared) -> Scores:
    """Frechet distance of the pooled features: FID, where they are InceptionV3's."""
    sides = []
    for images in (c.reference, c.judged):
        moments = Moments(f"features of {images.name}")
        moments.add(images.features.pooled)
        sides.append(moments)
    return {"fid": frechet_distance(*sides)}


def sfd(c: Compared) -> Scores:
    """Frechet distance of spatial features (Nash et al. 2021, arXiv 2103.03841): sFID, where they are InceptionV3's."""
    return {"sfid": frechet_distance(c.reference.features.spatial, c.judged.features.spatial)}


def inception(c: Compared) -> Scores:
    """Inception score, mean and deviation over `eval.splits` parts; needs no reference.

    A part has images from everywhere: real ones come class by class, of which a part in that order had but few.
    """
    logits = c.judged.features.logits
    order = np.random.default_rng(0).permutation(len(logits))
    return inception_score(logits[order], c.mesh, splits=c.settings.splits)


def kid(c: Compared) -> Scores:
    """Kernel distance, with percentiles 2.5 and 97.5 over subsets."""
    return kernel_distance(c.reference.features.pooled, c.judged.features.pooled, c.mesh)


def precision_and_recall(c: Compared) -> Scores:
    """Improved precision and recall, with `eval.k` neighbours."""
    return precision_recall(c.reference.features.pooled, c.judged.features.pooled, c.mesh, k=c.settings.k)


def nearest_train(c: Compared) -> Scores:
    """Median distance to the nearest training image in features: far below that of real images, it is memory."""
    _, distances = nearest(c.judged.features.pooled, c.train.features.pooled, 1, c.mesh)
    return {"nearest_train": float(np.median(distances))}


def knn_accuracy(
    images: UInt8[np.ndarray, "n h w 3"], labels: Int[np.ndarray, " n"], train: Source, val: Source
) -> Scores:
    """Share of samples to which a 3-nearest-neighbour classifier, fitted on the training images, gives their label.

    All images are reduced to 8x8 grey pixels by box averaging, the true resolution of the digits. "knn_accuracy_real"
    is the same share of the validation images, the ceiling that the samples are to be compared with.
    """
    from sklearn.neighbors import KNeighborsClassifier

    def box(size: int) -> Float[np.ndarray, "8 size"]:
        """The share that each pixel of a row has in each of its eighths."""
        edges, pixels = np.linspace(0, size, 9), np.arange(size)
        overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
        return np.maximum(overlap, 0) * 8 / size

    def features(x: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 64"]:
        return (box(x.shape[1]) @ x.mean(-1) @ box(x.shape[2]).T).reshape(len(x), 64)

    def everything(source: Source) -> tuple[np.ndarray, np.ndarray]:
        batch = source.batch(np.arange(len(source)))
        return features(batch["image"]), batch["label"]

    classifier = KNeighborsClassifier(3).fit(*everything(train))
    return {
        "knn_accuracy": float(classifier.score(features(images), labels)),
        "knn_accuracy_real": float(classifier.score(*everything(val))),
    }


class FeatureScore(NamedTuple):
    """A score of features; the fewest images that it can be computed of; whether its floor is of validation images
    whatever the reference is."""

    function: Callable[[Compared], Scores]
    least: Callable[[ConfigDict], int] = lambda settings: 2
    floor_of_val: bool = False


# Named as `extractors.scored_name` says, and computed of real images as well: their floor.
FEATURE_SCORES: Mapping[str, FeatureScore] = {
    "fd": FeatureScore(fd),
    "sfd": FeatureScore(sfd),
    "is": FeatureScore(inception, lambda settings: max(2, settings.splits)),
    "kid": FeatureScore(kid, lambda settings: 4),
    "precision_recall": FeatureScore(precision_and_recall, lambda settings: settings.k + 1),
    "nearest_train": FeatureScore(nearest_train, floor_of_val=True),
}
# Of pixels, with labels, and with what they are to be compared with beside them.
IMAGE_SCORES: Mapping[str, Callable[..., Scores]] = {"knn_accuracy": knn_accuracy}
SCORES = (*FEATURE_SCORES, *IMAGE_SCORES)
