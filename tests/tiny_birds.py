"""TFDS data sets that are made in a moment."""

import tensorflow_datasets as tfds
from PIL import Image


class TinyBirds(tfds.core.GeneratorBasedBuilder):
    """Like those of the catalogue: encoded images of any size, classes, and something else."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS = ("train", "test")

    def _info(self):
        label = tfds.features.ClassLabel(names=["heron", "robin", "goose"])
        features = {"image": tfds.features.Image(), "label": label, "id": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split):
        for k in range(40 if split == "train" else 6):
            image = Image.new("RGB", (20 + k, 30), (60 * (k % 3), 0, 0))
            yield k, {"image": image, "label": k % 3, "id": f"{split}-{k}"}


class TinyBirdsTrainOnly(TinyBirds):
    """Without a split to validate on."""

    SPLITS = ("train",)
