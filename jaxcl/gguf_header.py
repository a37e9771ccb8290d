"""Checks the counts and lengths in the header of a GGUF file before the gguf package follows them.

The package's reader believes them: a list that claims 2^60 values keeps it busy for ever.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from jaxcl.errors import UserError

# Bytes of a value by type; 8 is text, 9 a list.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9
# Far above what models have: the reader takes some microseconds for each.
_MOST_KEYS, _MOST_TENSORS, _MOST_VALUES = 2**16, 2**20, 2**23
_DEPTH, _AXES = 4, 4


def check_header(path: Path) -> None:
    """Checks that everything that the header announces is in the file.

    Args:
      path: the file.

    Raises:
      UserError: it is not a GGUF file, or announces more than it holds.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a complete GGUF file: it does not begin like one")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                _Header(content).check()
            except (ValueError, struct.error) as error:
                what = "it ends too early" if isinstance(error, struct.error) else error
                raise UserError(f"{path} is not a complete GGUF file: {what}") from None


class _Header:
    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._at = 4
        # Files for machines of the other byte order have their version at the other end.
        (version,) = struct.unpack_from("<I", content, 4)
        self._order = "<" if version & 0xFFFF else ">"
        self._values = 0

    def check(self) -> None:
        """Goes through the header.

        Raises:
          ValueError: it announces too much.
          struct.error: it ends too early.
        """
        self._number("I")  # version
        tensors, keys = self._number("Q"), self._number("Q")
        if keys > _MOST_KEYS or tensors > _MOST_TENSORS:
            raise ValueError(f"its header announces {keys} keys and {tensors} tensors")
        for _ in range(keys):
            self._text()
            self._value(self._number("I"), _DEPTH)
        for _ in range(tensors):
            self._text()
            if (axes := self._number("I")) > _AXES:
                raise ValueError(f"its header announces a tensor with {axes} axes")
            self._skip(8 * axes + 4 + 8)  # sizes, type and place

    def _value(self, kind: int, depth: int) -> None:
        if kind == _TEXT:
            self._text()
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _LIST and depth:
            kind, count = self._number("I"), self._number("Q")
            self._values += count
            if self._values > _MOST_VALUES:
                raise ValueError(f"its header announces a list of {count} values")
            if kind in _SIZES:
                self._skip(count * _SIZES[kind])
            else:
                for _ in range(count):
                    self._value(kind, depth - 1)
        else:
            raise ValueError(f"its header has a value of the unknown type {kind}")

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(self._order + form, self._content, self._at)
        self._at += struct.calcsize(self._order + form)
        return int(value)

    def _text(self) -> None:
        self._skip(self._number("Q"))

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._content):
            raise ValueError(f"its header announces {self._at} bytes or more, it has {len(self._content)}")
