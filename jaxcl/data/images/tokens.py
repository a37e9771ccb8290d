"""Images among tokens: what a tokenizer needs for them, and where they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

from jaxcl.data.images.processor import IMAGE, ImageProcessor
from jaxcl.data.images.reference import MARK
from jaxcl.data.images.seen import Seen
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError


def see(tokenizer: Tokenizer, images: ImageProcessor, image_token_id: int) -> None:
    """Lets a tokenizer take images in texts from now on.

    Args:
      tokenizer: the tokenizer of a model that sees.
      images: how images become tokens and tiles.
      image_token_id: the id that the model takes for an image token.

    Raises:
      UserError: the tokenizer lacks a token for images, or gives the image token another id.
    """
    missing = [name for name in images.specials() if tokenizer.backend.token_to_id(name) is None]
    if missing:
        raise UserError(
            f"the tokenizer has no token for {', '.join(missing[:3])}, which images need; expected the tokenizer of a "
            "model that sees"
        )
    if (found := tokenizer.backend.token_to_id(IMAGE)) != image_token_id:
        raise UserError(f"model.vision.image_token_id is {image_token_id}; the tokenizer's {IMAGE} is {found}")
    tokenizer.images = images


def images_key(tokenizer: Tokenizer) -> dict[str, Any]:
    """What examples follow from besides text, for an encoder's key."""
    return {} if tokenizer.images is None else {"images": tokenizer.images._asdict()}


def encode_seen(seen: Seen, tokenizer: Tokenizer, continued: bool) -> list[int]:
    """Token ids of a text with images.

    Args:
      seen: one text. Its images become special tokens; the text around them is encoded without any.
      tokenizer: the tokenizer.
      continued: see `Tokenizer.encode_batch`.
    """
    first, *rest = seen.texts[0].split(MARK)
    ids = tokenizer.encode(first, continued=continued) if first else []
    for replacement, text in zip(seen.replacements, rest, strict=True):
        ids += tokenizer.encode(replacement, continued=True, specials=True)
        ids += tokenizer.encode(text, continued=True) if text else []
    return ids


def image_index(tokens: Int[np.ndarray, "*rows tokens"], image_id: int | None) -> Int[np.ndarray, "*rows tokens"]:
    """For each token, its number among the image tokens of its row; -1 if it is not one.

    >>> image_index(np.array([7, 3, 3, 8, 3]), 3).tolist()
    [-1, 0, 1, -1, 2]
    """
    is_image = tokens == image_id
    return np.where(is_image, np.cumsum(is_image, axis=-1) - 1, -1).astype(np.int32)
