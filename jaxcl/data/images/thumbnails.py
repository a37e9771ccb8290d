"""Small copies of the images that a task is scored on, for reports."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jaxcl.data.files import replacing
from jaxcl.data.images.decode import decode
from jaxcl.data.images.reference import take_out

#: Longest side, in pixels.
SIDE = 96


def image_keys(text: str) -> list[tuple[str, bytes]]:
    """The images of a text, in order: a name that follows from the bytes of its file, and these."""
    return [(hashlib.sha256(one.content).hexdigest()[:16], one.content) for one in take_out(text, "image")[1]]


def thumbnail(content: bytes, where: str) -> bytes:
    """An image as a PNG file of at most `SIDE` pixels along each side.

    Args:
      content: the bytes of its file.
      where: what it is called in messages.

    Raises:
      UserError: see `decode`.
    """
    from PIL import Image

    image = Image.fromarray(decode(content, where))
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def write_thumbnails(path: Path, images: Mapping[str, bytes]) -> None:
    """Writes thumbnails as `.npz`, an array of bytes for each, unless all are there.

    Args:
      path: the file.
      images: files by name, as from `image_keys`.
    """
    if set(images) <= set(_names(path)):
        return
    found = {name: thumbnail(content, f"image {name}") for name, content in images.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **{name: np.frombuffer(one, np.uint8) for name, one in found.items()})


def _names(path: Path) -> Iterable[str]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return list(stored.files)
    except Exception:  # absent or damaged: written anew
        return []
