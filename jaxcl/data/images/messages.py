"""Where the images of a record belong in its messages."""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence
from pathlib import Path
from typing import Any

from jaxcl.data.images.processor import IMAGE
from jaxcl.data.images.reference import put_in, read_image
from jaxcl.errors import UserError

# Keys of a part under which an image may be.
_KEYS = ("path", "image", "bytes")


class Images:
    """The images of a record that its messages ask for.

    Args:
      given: those of the record's own field, as texts hold them.
      folder: where relative paths start; none: the current folder.
    """

    def __init__(self, given: Sequence[str], folder: Path | None) -> None:
        self._given, self._folder = list(given), folder
        self._used = 0

    def of_part(self, part: Mapping[str, Any], where: str) -> str:
        """The image of a part: its own, or the next of the record's field.

        Args:
          part: an object of type `image`.
          where: file, row and part, for messages.

        Raises:
          UserError: there is none, or it cannot be read.
        """
        own = next((part[key] for key in _KEYS if part.get(key) is not None), None)
        if own is not None:
            return read_image(own, where, self._folder)
        if self._used == len(self._given):
            raise UserError(
                f"{where}: an image without a path, and image_field holds {len(self._given)} images; expected either "
                "of them"
            )
        self._used += 1
        return self._given[self._used - 1]

    def put_in(self, messages: MutableSequence[Any], where: str) -> None:
        """Puts what no part has asked for in the place of `<image>` in texts of users, or before the first of them.

        Args:
          messages: the messages, which are changed.
          where: file and row, for messages.

        Raises:
          UserError: there are more or fewer places than images.
        """
        if not self._given or self._used == len(self._given):
            return
        if self._used:
            raise UserError(f"{where}: {len(self._given)} images, of which the messages use {self._used}")
        users = [message for message in messages if message["role"] == "user"]
        places = [message["content"].count(IMAGE) for message in users]
        if sum(places) not in (0, len(self._given)):
            raise UserError(f"{where}: {len(self._given)} images, but {IMAGE} occurs {sum(places)} times in the texts")
        if not sum(places) and users:
            places[0] = len(self._given)
        first = 0
        for message, count in zip(users, places, strict=True):
            message["content"] = put_in(message["content"], self._given[first : first + count], where)
            first += count
