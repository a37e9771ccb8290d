"""From the records of a source to the rows of its splits, in memory or read when they are needed."""

from __future__ import annotations

import dataclasses
import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.data.cache import Cache, agreed
from jaxcl.data.fingerprint import RowsHash, RowsPrint
from jaxcl.data.formats.base import Part, Record, Records, Where
from jaxcl.data.heldout import hold_out, rank
from jaxcl.data.images.reference import put_in, read_images
from jaxcl.data.messages import read_messages, up_to_last_answer
from jaxcl.data.spec import Kind
from jaxcl.data.split import ListRows, Members, Row, Rows, StreamedRows
from jaxcl.data.values import as_text
from jaxcl.errors import UserError


class RowReader:
    """Records to rows.

    Attributes:
      kind: kind of the rows.
      key: what a row follows from besides its record.
    """

    def __init__(
        self,
        kind: Kind,
        names: Mapping[str, str],
        template: str | None,
        image_field: str | None = None,
        image_folder: str | None = None,
    ) -> None:
        """Chooses fields.

        Args:
          kind: kind of the rows.
          names: field of the record by field of the row.
          template: prompt from fields of the record; none: its prompt field.
          image_field: field that holds images; none: there is none.
          image_folder: where paths of images start; none: in the folder of the file that names them.
        """
        self.kind = kind
        self._image_field = image_field
        self._image_folder = None if image_folder is None else Path(image_folder)
        self.key: dict[str, Any] = {"kind": kind, "names": dict(names), "template": template}
        if image_field is not None:
            self.key["images"] = image_field
        if image_folder is not None:
            self.key["image_folder"] = image_folder
        self._names = dict(names)
        self._template = template
        self._parts = list(string.Formatter().parse(template)) if template else []
        self._wanted = [field for _, field, _, _ in self._parts if field]

    def __call__(self, place: object, record: Record) -> Row | None:
        """The row of a record; `None` for a passage without text.

        Raises:
          UserError: the record lacks a field, or a field is not text.
        """
        images = self._images(place, record)
        if self.kind == "chat":
            messages = read_messages(record, str(place), images, self._folder(place))
            *before, last = up_to_last_answer(messages, str(place))
            return {"prompt": json.dumps(before, ensure_ascii=False), "answer": last["content"]}
        for field in (*self._names.values(), *self._wanted):
            if field not in record:
                fields = ", ".join(map(str, record)) or "none"
                raise UserError(f"{place}: no field {field!r}; its fields are {fields}")
        row = {name: as_text(record[field], field, place) for name, field in self._names.items()}
        if self._template:
            values = {field: as_text(record[field], field, place) for field in self._wanted}
            row["prompt"] = "".join(text + (values[field] if field else "") for text, field, _, _ in self._parts)
        if images:
            row["prompt"] = put_in(row["prompt"], images, str(place))
        return None if self.kind == "text" and not row["text"].strip() else row

    def _images(self, place: object, record: Record) -> list[str]:
        field = self._image_field
        if field is None:
            return []
        if field not in record:
            raise UserError(f"{place}: no field {field!r}; its fields are {', '.join(map(str, record)) or 'none'}")
        return read_images(record[field], f"{place}: field {field!r}", self._folder(place))

    def _folder(self, place: object) -> Path | None:
        """The folder of images: by default that of the record's file; none for one behind a URL, or in no file."""
        if self._image_folder is not None:
            return self._image_folder
        path = place[0].path if isinstance(place, Where) else ""
        return Path(path).parent if Path(path).is_file() else None


def held_out(given: str, splits: Mapping[str, Any]) -> tuple[str, ...]:
    """The splits that are held out from the records of `given`, one of a source's `splits`.

    A missing test split is held out from the training rows. A source with a single file gets a development split in
    the same way. A source with splits but without a development split gets none, because nothing depends on it.
    """
    if given == "all":
        return ("dev", "test")
    return ("test",) if given == "train" and "test" not in splits else ()


def read_rows(records: Records, reader: RowReader) -> ListRows:
    """The rows of records, in memory."""
    found = ListRows()
    for part in records.parts():
        for place, record in records.read(part):
            if (row := reader(place, record)) is not None:
                found.append(row)
    return found


def divide(rows: ListRows, given: str, held: tuple[str, ...], share: float, seed: int) -> dict[str, Rows]:
    """Rows in memory by split; see `hold_out`."""
    if not held:
        return {given: rows}
    return {split: ListRows(found) for split, found in hold_out(rows, share, seed, dev="dev" in held).items()}


def open_splits(
    records: Records, reader: RowReader, given: str, held: tuple[str, ...], share: float, seed: int, cache: Cache
) -> dict[str, Rows]:
    """The rows of some records by split, which are read when they are needed.

    At first, all are read to count them and to take their fingerprints, which the cache keeps.
    """
    splits = ("train", *held) if held else (given,)
    limits = {"test": share, "dev": 2 * share} if "dev" in held else {"test": share} if held else {}
    key: dict[str, Any] = {"records": records.key(), "reader": reader.key, "held": held, "given": given}
    if held:
        key |= {"share": share, "seed": seed}
    parts = records.parts()
    counting = _Scan(records, tuple(parts), reader, splits, limits, seed)
    paths = cache.build("scans", key, len(parts), counting, ".npz")
    scans = [_prints(path) for path in paths]
    opened: dict[str, Rows] = {}
    for number, split in enumerate(splits):
        whole = RowsHash()
        for scan in scans:
            whole = whole.join(RowsHash.read(scan[number]))
        opened[split] = StreamedRows(
            records,
            reader,
            counts=[scan[number]["rows"] for scan in scans],
            members=Members(paths, number) if held else None,
            chosen=None,
            fingerprint=whole.result(),
            key=key | {"split": split},
        )
    if not agreed(cache, all(map(len, opened.values()))):  # few rows: at least one different row goes to each split
        return divide(read_rows(records, reader), given, held, share, seed)
    return opened


def limited(rows: Rows, limit: int | None, seed: int, cache: Cache | None = None) -> Rows:
    """At most `limit` of the rows, chosen at random, in their order.

    Args:
      rows: the rows.
      limit: largest number; none: all.
      seed: seed of the choice.
      cache: keeps the fingerprint of chosen rows that are streamed.
    """
    if limit is None or agreed(cache, limit >= len(rows)):
        return rows
    chosen = np.sort(np.random.default_rng((seed, len(rows))).permutation(len(rows))[:limit])
    if cache is None or not isinstance(rows, StreamedRows):
        return ListRows(rows.pick(chosen.tolist()))
    return rows.choose(chosen, {"limit": limit, "seed": seed}, cache)


@dataclasses.dataclass(frozen=True)
class _Scan:
    """Reads a part to count the rows of its splits; writes their fingerprints, and the split of each row."""

    records: Records
    parts: tuple[Part, ...]
    reader: RowReader
    splits: tuple[str, ...]
    limits: Mapping[str, float]
    seed: int

    def __call__(self, part: int, path: Path) -> None:
        prints = [RowsHash() for _ in self.splits]
        numbers = bytearray()
        for place, record in self.records.read(self.parts[part]):
            if (row := self.reader(place, record)) is not None:
                split = self._split(row)
                prints[split].add(row)
                numbers.append(split)
        found = json.dumps([one.result() for one in prints])
        with path.open("wb") as file:
            np.savez(file, prints=found, splits=np.frombuffer(numbers if self.limits else b"", np.uint8))

    def _split(self, row: Row) -> int:
        if not self.limits:
            return 0
        found = rank(row, self.seed)
        split = next((split for split, limit in self.limits.items() if found < limit), self.splits[0])
        return self.splits.index(split)


def _prints(path: Path) -> list[RowsPrint]:
    with np.load(path) as scan:
        found: list[RowsPrint] = json.loads(str(scan["prints"]))
    return found
