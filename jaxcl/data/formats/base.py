"""The records of a source, in parts that can be read apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

Record = Mapping[str, Any]


class Part(NamedTuple):
    """What is read at once: a file, a range of its bytes (the lines that begin there), or some of its row groups."""

    path: str
    start: int = 0
    stop: int | None = None


class Records(Protocol):
    """The records of one split, in a fixed order, in parts that can be read apart and by different processes."""

    where: str

    def key(self) -> str:
        """Changes if the content may have changed."""
        ...

    def parts(self) -> list[Part]:
        """The parts, which follow from the files alone."""
        ...

    def read(self, part: Part) -> Iterator[tuple[str, Record]]:
        """The place of each record, for messages, and the record."""
        ...


class ListRecords:
    """Records in memory."""

    def __init__(self, records: Sequence[Record], where: str) -> None:
        self.records = records
        self.where = where

    def key(self) -> str:
        """Hash of the content."""
        content = json.dumps([dict(record) for record in self.records], default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def parts(self) -> list[Part]:
        """One part."""
        return [Part(self.where)]

    def read(self, part: Part) -> Iterator[tuple[str, Record]]:
        """All records."""
        for number, record in enumerate(self.records, 1):
            yield f"{self.where} row {number}", record
