"""What readers give: records with their place, in parts that different processes can read."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

Record = Mapping[str, Any]

_BYTES = 16


class Part(NamedTuple):
    """What is read at once: a file, a range of its bytes, or some of its row groups.

    Attributes:
      path: the file, as a path or a URL.
      start: first byte or row group. The lines that begin in a range of bytes belong to it, with all of their bytes.
      stop: the byte or row group after the last one; none: up to the end.
    """

    path: str
    start: int = 0
    stop: int | None = None


class Numbering:
    """Names the records of a part in messages.

    Args:
      path: the file.
      unit: what is counted in it: line or row.
      before: how many of them come before the part. It is called when a message is first written: counting the lines
        of all that comes before would cost more than reading the part.

    >>> Numbering("a.txt", "line", lambda: 10).at(2)
    'a.txt line 12'
    """

    def __init__(self, path: str, unit: str, before: Callable[[], int] = lambda: 0) -> None:
        self.path, self._unit, self._count = path, unit, before

    @functools.cached_property
    def _before(self) -> int:
        return self._count()

    def number(self, number: int) -> int:
        """The number in the file of the line or row with this number in the part; both are counted from 1."""
        return self._before + number

    def at(self, number: int) -> str:
        """The place of the line or row with this number in the part."""
        return f"{self.path} {self._unit} {self.number(number)}"


class Where(tuple[Numbering, int]):
    """The place of one record; `str` and f-strings write it as `FILE line 12` or `FILE row 3`.

    It is made for each record and seldom written: hence a pair of the part's numbering and the number in the part, from
    1, which is made faster than any other object.

    >>> f"{Where((Numbering('a.txt', 'line'), 3))}: no answer"
    'a.txt line 3: no answer'
    """

    __slots__ = ()

    def __str__(self) -> str:
        numbering, number = self
        return numbering.at(number)

    __repr__ = __str__


class Records(Protocol):
    """The records of one split, in a fixed order, in parts that can be read apart and by different processes."""

    @property
    def where(self) -> str:
        """File, folder or glob, for messages."""

    def key(self) -> str:
        """A hash that changes if the records may have changed; it does not depend on the folder that they are in."""

    def parts(self) -> list[Part]:
        """The parts in their order. They depend on the files alone, never on the number of processes."""

    def read(self, part: Part) -> Iterator[tuple[Where, Record]]:
        """The records of one part, each with its place."""


class Found(NamedTuple):
    """What a source holds.

    Attributes:
      splits: records by split: `train`, `dev` and `test`, or `all` for a source without splits.
      labels: class names from `labels.json`, in its order; empty if there is no such file.
    """

    splits: dict[str, Records]
    labels: tuple[str, ...] = ()


class ListRecords:
    """Records that are in memory, as one part.

    Args:
      rows: the records.
      where: what they come from, for messages.

    >>> records = ListRecords([{"text": "a"}, {"text": "b"}], "rows of mine")
    >>> [(str(where), record["text"]) for part in records.parts() for where, record in records.read(part)]
    [('rows of mine row 1', 'a'), ('rows of mine row 2', 'b')]
    """

    def __init__(self, rows: Sequence[Record], where: str) -> None:
        self.rows, self.where = rows, where

    def key(self) -> str:
        """A hash of the rows' content.

        Raises:
          TypeError: a value is not text, a number, bytes, null, an array, or a list or mapping of such.
        """
        found = hashlib.blake2b(digest_size=_BYTES)
        for row in self.rows:
            _feed(found.update, row)
        return found.hexdigest()

    def parts(self) -> list[Part]:
        """One part."""
        return [Part(self.where)]

    def read(self, part: Part) -> Iterator[tuple[Where, Record]]:
        """All rows."""
        numbering = Numbering(self.where, "row")
        for number, row in enumerate(self.rows, 1):
            yield Where((numbering, number)), row


def _feed(update: Callable[[bytes], object], value: Any) -> None:
    """Feeds a value to a hash so that different values feed different bytes: each begins with its kind and length."""
    if isinstance(value, str):
        content = value.encode("utf-8", "surrogatepass")
        update(b"s%d " % len(content) + content)
    elif isinstance(value, bytes | bytearray | memoryview):
        update(b"b%d " % len(value) + bytes(value))
    elif value is None or isinstance(value, bool | int | float | np.generic):
        update(f"n{value!r} ".encode())
    elif isinstance(value, Mapping):
        update(b"m%d " % len(value))
        for name in value:
            _feed(update, name)
            _feed(update, value[name])
    elif isinstance(value, np.ndarray) and value.dtype != object:
        update(f"a{value.dtype.str}{value.shape} ".encode() + value.tobytes())
    elif isinstance(value, Sequence | np.ndarray):
        update(b"l%d " % len(value))
        for item in value:
            _feed(update, item)
    else:
        raise TypeError(f"{type(value).__name__} has no content that can be hashed")


__all__ = ["Found", "ListRecords", "Numbering", "Part", "Record", "Records", "Where"]
