"""What a run measures on its samples when it ends. A new score is one function and one line in `SCORES`."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxdiff.data.sources import Source

Scores = dict[str, float]


def knn_accuracy(
    images: UInt8[np.ndarray, "n h w 3"], labels: Int[np.ndarray, " n"], train: Source, val: Source
) -> Scores:
    """Share of samples to which a 3-nearest-neighbour classifier, fitted on the training images, gives their label.

    All images are reduced to 8x8 grey pixels by box averaging, the true resolution of the digits. "knn_accuracy_real"
    is the same share of the validation images, the ceiling that the samples are to be compared with.
    """
    from sklearn.neighbors import KNeighborsClassifier

    def features(x: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 64"]:
        n, h, w, _ = x.shape
        return x.mean(-1).reshape(n, 8, h // 8, 8, w // 8).mean((2, 4)).reshape(n, 64)

    def everything(source: Source) -> tuple[np.ndarray, np.ndarray]:
        batch = source.batch(np.arange(len(source)))
        return features(batch["image"]), batch["label"]

    classifier = KNeighborsClassifier(3).fit(*everything(train))
    return {
        "knn_accuracy": float(classifier.score(features(images), labels)),
        "knn_accuracy_real": float(classifier.score(*everything(val))),
    }


SCORES: Mapping[str, Callable[..., Scores]] = {"knn_accuracy": knn_accuracy}
