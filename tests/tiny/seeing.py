"""A tiny decoder that sees, and batches with images for it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcl.models.batch import Batch
from jaxcl.models.images import NO_IMAGE, Images
from jaxcl.models.network import Network
from jaxcl.models.vision_config import VisionConfig
from tests.tiny.batches import batch_of
from tests.tiny.networks import tiny_llama
from tests.tiny.vision import VISION

SIZES: dict[str, Any] = VISION | {"num_layers": 2, "patch_size": 2, "shuffle": 2, "init_std": 0.5}
IMAGE_TOKENS = 4


def seeing(model: dict[str, Any] | None = None, **changes: Any) -> Network:
    """A network of `SIZES`, with changes of the tower and of the `model` around it."""
    return tiny_llama(vision=VisionConfig(**SIZES | changes), **(model or {}))


def images_of(rows: list[list[int]], count: int, **fields: Any) -> Images:
    """Random images for rows of image numbers: each has its tokens, after a token of text."""
    pixels = np.random.default_rng(0).normal(size=(len(rows), count, 8, 8, 3)).astype(np.float32)
    index = np.full((len(rows), 16), NO_IMAGE, np.int32)
    for row, numbers in enumerate(rows):
        for place, number in enumerate(numbers):
            start = 1 + place * (IMAGE_TOKENS + 1)
            index[row, start : start + IMAGE_TOKENS] = number * IMAGE_TOKENS + np.arange(IMAGE_TOKENS)
    return Images(jnp.asarray(pixels), jnp.asarray(index), **fields)


def batch(images: Images | None, rows: int = 2) -> Batch:
    """Rows of random tokens, scored everywhere."""
    return batch_of(np.ones((rows, 16), np.int32), images=images)
