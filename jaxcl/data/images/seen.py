"""Texts with images as the model gets them: with tokens in place of the images, and tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxcl.data.images.decode import decode
from jaxcl.data.images.processor import ImageProcessor
from jaxcl.data.images.reference import has_images, take_out
from jaxcl.data.ragged import Ragged
from jaxcl.errors import UserError

Pixels = UInt8[np.ndarray, "tiles tile tile 3"]


class Seen(NamedTuple):
    """What is in the images of some texts.

    Attributes:
      texts: the texts, with one `MARK` in the place of each image.
      replacements: the text that each image becomes, in order.
      pixels: the tiles of all images, in order; `None` without images.
    """

    texts: list[str]
    replacements: list[str]
    pixels: Pixels | None


def look(texts: Sequence[str], processor: ImageProcessor | None, where: str) -> Seen:
    """Takes the images out of texts and processes them.

    Args:
      texts: the texts of a row.
      processor: the model's; none: it does not see.
      where: what the row is called in messages.

    Raises:
      UserError: an image is broken, or the model does not see.
    """
    if not any(map(has_images, texts)):
        return Seen(list(texts), [], None)
    if processor is None:
        raise UserError(f"{where}: an image, but the model does not see (model.vision is none); expected text")
    kept: list[str] = []
    replacements: list[str] = []
    pixels: list[Pixels] = []
    for text in texts:
        rest, references = take_out(text, where)
        kept.append(rest)
        for reference in references:
            name = f" ({reference.name})" if reference.name else ""
            tiles = processor.tiles(decode(reference.content, f"{where}: image {len(replacements) + 1}{name}"))
            replacements.append(processor.text(tiles.rows, tiles.columns))
            pixels.append(tiles.pixels)
    return Seen(kept, replacements, np.concatenate(pixels))


def flat(pixels: Sequence[Pixels | None]) -> Ragged:
    """The tiles of several examples as sequences of bytes."""
    none = np.zeros(0, np.uint8)
    return Ragged.of_arrays([none if one is None else one.reshape(-1) for one in pixels], np.uint8)
