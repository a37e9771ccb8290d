"""TFDS builder of a few made-up reviews."""

import numpy as np
import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder):
    """30 rows with text, label and a score."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["bad", "good"]),
            "score": tfds.features.Scalar(dtype=np.float32),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(0, 20),
            "validation": self._generate_examples(20, 24),
            "test": self._generate_examples(24, 30),
        }

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            yield i, {"text": f"review {i} tasted of café", "label": i % 2, "score": i / 4}
