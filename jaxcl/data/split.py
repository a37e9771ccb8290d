"""The rows of a split: in memory, or read from their source whenever they are needed."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int

from jaxcl.data.cache import Cache
from jaxcl.data.files import write_json
from jaxcl.data.fingerprint import RowsHash, RowsPrint, rows_print, texts_print
from jaxcl.data.formats.base import Records

Row = dict[str, str]


class Rows(Protocol):
    """Rows of a split, in a fixed order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...

    def pick(self, numbers: Sequence[int]) -> list[Row]:
        """The rows of the given numbers, which increase."""
        ...

    @property
    def fingerprint(self) -> RowsPrint:
        """Fingerprint of the rows, see `rows_print`."""
        ...


class ListRows(list[Row]):
    """Rows in memory."""

    def pick(self, numbers: Sequence[int]) -> list[Row]:
        """The rows of the given numbers."""
        return [self[number] for number in numbers]

    @property
    def fingerprint(self) -> RowsPrint:
        """Fingerprint of the rows, see `rows_print`."""
        return rows_print(self)


def _write_print(rows: StreamedRows, part: int, path: Path) -> None:
    write_json(path, rows.fingerprint)


class JoinedRows:
    """The rows of several sources, one source after another.

    Attributes:
      parts: the rows of each source.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = list(parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(self.parts)

    def pick(self, numbers: Sequence[int]) -> list[Row]:
        """The rows of the given numbers, which increase."""
        found: list[Row] = []
        first = 0
        for rows in self.parts:
            last = first + len(rows)
            if chosen := [number - first for number in numbers if first <= number < last]:
                found += rows.pick(chosen)
            first = last
        return found

    @property
    def fingerprint(self) -> RowsPrint:
        """Fingerprint of the rows, see `rows_print`."""
        whole = RowsHash()
        for rows in self.parts:
            whole = whole.join(RowsHash.read(rows.fingerprint))
        # Rows that move from one source to another change the mixture, although their order is the same.
        return {**whole.result(), "ordered": texts_print(rows.fingerprint["ordered"] for rows in self.parts)}


class Members(NamedTuple):
    """Which rows of a source's parts belong to a split.

    Attributes:
      scans: one file per part with an array `splits`, the number of each row's split.
      number: number of the split.
    """

    scans: Sequence[Path]
    number: int

    def of(self, part: int) -> Bool[np.ndarray, " rows"]:
        """Whether each row of a part belongs to it."""
        with np.load(self.scans[part]) as scan:
            return np.asarray(scan["splits"] == self.number)


class StreamedRows:
    """Rows that are read from their source part by part, and never all in memory.

    Attributes:
      key: everything that the rows follow from, as JSON; see `Cache.build`.
      parts: the parts of the source.
      fingerprint: fingerprint of the rows.
    """

    def __init__(
        self,
        records: Records,
        read: Callable[[object, Mapping[str, Any]], Row | None],
        *,
        counts: Sequence[int],
        members: Members | None,
        chosen: Int[np.ndarray, " chosen"] | None,
        fingerprint: RowsPrint | None,
        key: Mapping[str, Any],
    ) -> None:
        """Describes the rows; reads nothing, unless there is no `fingerprint`.

        Args:
          records: records of the source.
          read: a record, and its place for messages, to its row; `None` if it has none.
          counts: number of the split's rows in each part.
          members: which rows of the source they are; none: all.
          chosen: numbers of those rows that are used, increasing; none: all.
          fingerprint: fingerprint of the rows that are used, if it is known.
          key: everything that the rows follow from.
        """
        self.parts = records.parts()
        self.key = key
        self._records = records
        self._read = read
        self._counts = list(counts)
        self._members = members
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._chosen = chosen
        self._fingerprint = fingerprint

    def choose(self, chosen: Int[np.ndarray, " chosen"], key: Mapping[str, Any], cache: Cache) -> StreamedRows:
        """Some of the rows.

        Args:
          chosen: their numbers, increasing.
          key: what the choice follows from.
          cache: keeps their fingerprint.
        """

        def some(fingerprint: RowsPrint | None) -> StreamedRows:
            return StreamedRows(
                self._records,
                self._read,
                counts=self._counts,
                members=self._members,
                chosen=chosen if self._chosen is None else self._chosen[chosen],
                fingerprint=fingerprint,
                key={**self.key, "chosen": [*self.key.get("chosen", []), dict(key)]},
            )

        found = some(None)
        paths = cache.build("prints", found.key, 1, functools.partial(_write_print, found), ".json")
        return some(json.loads(paths[0].read_text()))

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._chosen is None else len(self._chosen)

    def __iter__(self) -> Iterator[Row]:
        for part in range(len(self.parts)):
            for _, row in self.part(part):
                yield row

    def part(self, number: int) -> Iterator[tuple[int, Row]]:
        """The rows of a part with their numbers."""
        first = int(self._starts[number])
        if self._chosen is None:
            yield from enumerate(self._rows(number), first)
            return
        start, stop = (self._number_before(int(self._starts[number + step])) for step in (0, 1))
        wanted = iter(enumerate(self._chosen[start:stop].tolist(), start))
        found, at_next = next(wanted, (0, -1))
        for at, row in enumerate(self._rows(number), first):
            if at_next < 0:
                return
            if at == at_next:
                yield found, row
                found, at_next = next(wanted, (0, -1))

    def pick(self, numbers: Sequence[int]) -> list[Row]:
        """The rows of the given numbers, which increase; reads up to the last of them."""
        found: list[Row] = []
        for part in range(len(self.parts)):
            bounds = (self._number_before(int(self._starts[part + step])) for step in (0, 1))
            first, last = (bisect.bisect_left(numbers, bound) for bound in bounds)
            if wanted := set(numbers[first:last]):
                rows = (row for number, row in self.part(part) if number in wanted)
                found += itertools.islice(rows, len(wanted))
        return found

    @property
    def fingerprint(self) -> RowsPrint:
        """Fingerprint of the rows, see `rows_print`."""
        if self._fingerprint is None:
            self._fingerprint = rows_print(self)
        return self._fingerprint

    def _number_before(self, at: int) -> int:
        return at if self._chosen is None else int(np.searchsorted(self._chosen, at))

    def _rows(self, number: int) -> Iterator[Row]:
        members = None if self._members is None else self._members.of(number)
        at = 0
        for place, record in self._records.read(self.parts[number]):
            if (row := self._read(place, record)) is not None:
                if members is None or members[at]:
                    yield row
                at += 1
