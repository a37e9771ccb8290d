"""How a row's text holds images: each as the bytes of its file, so that what a row says depends on no other file.

Rows are texts, which are hashed, cached and remembered as such. An image in a text is `MARK`, the name that the record
had for it, a bar, its bytes in base 64, and `MARK` again.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxcl.data.files import reason
from jaxcl.data.formats.storage import is_url
from jaxcl.data.images.decode import check, encode_png
from jaxcl.data.images.processor import IMAGE
from jaxcl.errors import UserError

MARK = "\ufffc"
"""Unicode's object replacement character."""

#: Bytes that the file of an image may have.
MAX_BYTES = 2**26
_IN_TEXT = re.compile(f"{MARK}([^|{MARK}]*)\\|([A-Za-z0-9+/=]+){MARK}")


class Reference(NamedTuple):
    """An image of a row.

    Attributes:
      name: what the record calls it, or nothing.
      content: the bytes of its file.
    """

    name: str
    content: bytes

    def write(self) -> str:
        """As a text holds it.

        >>> Reference("a.png", b"abc").write().strip(MARK)
        'a.png|YWJj'
        """
        return f"{MARK}{self.name}|{base64.b64encode(self.content).decode()}{MARK}"


def has_images(text: str) -> bool:
    """Whether a text holds an image."""
    return MARK in text and _IN_TEXT.search(text) is not None


def shown(text: str) -> str:
    """A text for people: with names in place of images.

    >>> shown(Reference("a.png", b"abc").write() + "What is this?")
    '[image a.png]What is this?'
    """
    return _IN_TEXT.sub(lambda found: f"[image {found[1]}]".replace(" ]", "]"), text) if MARK in text else text


def take_out(text: str, where: str) -> tuple[str, list[Reference]]:
    """A text with one `MARK` in the place of each image, and the images.

    Args:
      text: the text.
      where: what it is called in messages.

    Raises:
      UserError: the text holds images and further marks, or bytes that are not base 64.
    """
    rest, found = [], []
    last = 0
    for match in _IN_TEXT.finditer(text):
        rest.append(text[last : match.start()])
        last = match.end()
        try:
            found.append(Reference(match[1], base64.b64decode(match[2], validate=True)))
        except (binascii.Error, ValueError) as error:
            raise UserError(f"{where}: image {len(found) + 1}: {error}") from error
    if not found:
        return text, []
    rest.append(text[last:])
    if any(MARK in part for part in rest):
        raise UserError(f"{where}: the text holds the character U+FFFC, which marks images; expected text without it")
    return MARK.join(rest), found


def read_image(value: Any, where: str, folder: Path | None) -> str:
    """An image of a record, as a text holds it.

    Args:
      value: a path, bytes, an array, or an object with `path` or `bytes`, as Hugging Face's data sets have.
      where: file, row and field, for messages.
      folder: the folder of the record's file, from which relative paths start; none: the current one.

    Raises:
      UserError: it is none of these, a URL, or not an image that can be read.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, np.ndarray):
        reference = Reference("", encode_png(value, where))
    elif isinstance(value, bytes | bytearray | memoryview):
        reference = Reference("", bytes(value))
    elif isinstance(value, str) and value:
        reference = Reference(re.sub(f"[|{MARK}]", "_", value), _read(value, where, folder))
    else:
        raise UserError(f"{where}: expected an image: a path, bytes, or an object with path or bytes")
    check(reference.content, f"{where}: {reference.name}" if reference.name else where)
    return reference.write()


def read_images(value: Any, where: str, folder: Path | None) -> list[str]:
    """Images of a record: one, a list of them, or none where there is no value; see `read_image`."""
    if value is None:
        return []
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [read_image(one, f"{where}: image {number}", folder) for number, one in enumerate(value, 1)]
    return [read_image(value, where, folder)]


def _read(path: str, where: str, folder: Path | None) -> bytes:
    if is_url(path) or path.startswith("data:"):
        raise UserError(f"{where}: {path[:200]} is a URL; images are read from local files only")
    try:
        place = Path(path).expanduser()
        place = place if folder is None else folder / place
        size = place.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{where}: {path} has {size:,} bytes; allowed are {MAX_BYTES:,}")
        return place.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        words = reason(error) if isinstance(error, OSError) else str(error)
        raise UserError(f"{where}: cannot read the image {path[:200]}: {words}") from error


def put_in(text: str, images: Sequence[str], where: str) -> str:
    """A text with images: in the places of `<image>`, or before the text if it has none.

    Args:
      text: the text.
      images: as `read_image` gives them.
      where: file and row, for messages.

    Raises:
      UserError: the text has another number of places.

    >>> put_in("<image>What?", ["IMAGE"], ""), put_in("What?", ["IMAGE"], "")
    ('IMAGEWhat?', 'IMAGEWhat?')
    """
    places = text.count(IMAGE) if images else 0
    if not places:
        return "".join(images) + text
    if places != len(images):
        raise UserError(f"{where}: {len(images)} images, but {IMAGE} occurs {places} times in the text")
    parts = text.split(IMAGE)
    return parts[0] + "".join(image + part for image, part in zip(images, parts[1:], strict=True))


__all__ = ["MARK", "Reference", "has_images", "put_in", "read_image", "read_images", "shown", "take_out"]
