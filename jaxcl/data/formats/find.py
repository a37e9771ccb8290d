"""From the `scheme:rest` of a source to its files, and from their names to splits."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxcl.data.files import parse_json
from jaxcl.data.formats import storage, streams
from jaxcl.data.formats.base import Found, Part, Record, Records, Where
from jaxcl.data.formats.fingerprint import files_key
from jaxcl.data.formats.json_records import json_parts, read_json_records
from jaxcl.data.formats.lines import line_parts, without_mark
from jaxcl.data.formats.parquet import parquet_parts, read_parquet
from jaxcl.data.formats.splits import by_split, first_named
from jaxcl.data.formats.storage import Entry
from jaxcl.data.formats.streams import COMPRESSED, bare
from jaxcl.data.formats.tables import read_csv, read_tsv
from jaxcl.data.formats.text import read_text_lines
from jaxcl.errors import UserError


class Format(NamedTuple):
    """A format of files.

    Attributes:
      suffixes: what names of its files end in; the second ones count in folders that have none of the first.
      parts: the parts of a file.
      read: the records of a part; it also gets the name of the field for formats without fields.
      packed: whether files may be compressed as a whole.
    """

    suffixes: tuple[tuple[str, ...], ...]
    parts: Callable[[str], list[Part]]
    read: Callable[[Part, str], Iterator[tuple[Where, Record]]]
    packed: bool = True


def _whole(path: str) -> list[Part]:
    return [Part(path)]


def _fieldless(read: Callable[[Part], Iterator[tuple[Where, Record]]]) -> Callable[[Part, str], Iterator]:
    return lambda part, field: read(part)


_LISTS, _LINES = (".json",), (".jsonl", ".ndjson")
_FORMATS: dict[str, Format] = {
    "json": Format((_LISTS, _LINES), json_parts, _fieldless(read_json_records)),
    "jsonl": Format((_LINES, _LISTS), json_parts, _fieldless(read_json_records)),
    "text": Format(((".txt", ".text"),), line_parts, read_text_lines),
    "parquet": Format(((".parquet", ".pq"),), parquet_parts, _fieldless(read_parquet), packed=False),
    "csv": Format(((".csv",),), _whole, _fieldless(read_csv)),
    "tsv": Format(((".tsv", ".tab"),), _whole, _fieldless(read_tsv)),
}
#: Schemes of sources whose rest is a file, a folder or a glob.
SCHEMES: tuple[str, ...] = tuple(_FORMATS)
_LABELS = 2**24  # bytes of `labels.json`


@dataclass(frozen=True)
class FileRecords:
    """The records of some files of one format, in the order of the files.

    Attributes:
      scheme: one of `SCHEMES`.
      files: paths or URLs.
      where: see `Records`.
      text_field: name of the field of text files.
    """

    scheme: str
    files: tuple[str, ...]
    where: str
    text_field: str

    def key(self) -> str:
        """See `Records`."""
        field = self.text_field if self.scheme == "text" else ""
        return hashlib.blake2b(repr((self.scheme, field, files_key(self.files))).encode(), digest_size=16).hexdigest()

    def parts(self) -> list[Part]:
        """See `Records`."""
        return [part for path in self.files for part in _FORMATS[self.scheme].parts(path)]

    def read(self, part: Part) -> Iterator[tuple[Where, Record]]:
        """See `Records`."""
        return _FORMATS[self.scheme].read(part, self.text_field)


def find_records(scheme: str, rest: str, *, text_field: str) -> Found:
    """Finds the files of a source and their splits; reads none but `labels.json`.

    A file is one split, `all`. A folder has the splits that its files (`train.jsonl`, `test-00000-of-00002.parquet`)
    or its folders (`train/`, `test/`) are named after; without such names, all its files are one split. So are the
    files that a glob matches, unless their names say that they are of several splits.

    Args:
      scheme: one of `SCHEMES`.
      rest: a file, a folder or a glob, as a path or a URL of fsspec.
      text_field: name of the field that holds a line of a text file.

    Raises:
      UserError: there is no such file, the folder or glob has no usable files, or they are of several formats.
    """
    place = rest if storage.is_url(rest) else os.path.expanduser(rest)
    source = _Source(scheme, rest, text_field)
    is_glob = glob.has_magic(place)
    what = None if is_glob and storage.is_url(place) else storage.what_is(place)
    if what == "folder":
        return _in_folder(source, place)
    if what == "file":
        return Found({"all": source.records([place], place)})
    if is_glob:
        return _in_glob(source, place)
    raise UserError(f"{place} does not exist")


class _Source(NamedTuple):
    scheme: str
    rest: str
    text_field: str

    @property
    def written(self) -> str:
        return f"source {self.scheme}:{self.rest}"

    @property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(suffix for group in _FORMATS[self.scheme].suffixes for suffix in group)

    def records(self, files: Sequence[str], where: str) -> Records:
        for path in files:
            if not _FORMATS[self.scheme].packed and path.endswith(COMPRESSED):
                raise UserError(f"{path}: a {self.scheme} file is compressed inside; decompress the file itself")
        return FileRecords(self.scheme, tuple(files), files[0] if len(files) == 1 else where, self.text_field)

    def own(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those that have the format's names: the first suffixes that any of them has."""
        for suffixes in _FORMATS[self.scheme].suffixes:
            found = _once(
                entry
                for entry in entries
                if bare(entry.name).lower().endswith(suffixes) and entry.name != "labels.json"
            )
            if found:
                _refuse_folders(found)
                return found
        return []


# ---------------------------------------------------------------- folders and globs


def _in_folder(source: _Source, folder: str) -> Found:
    entries = storage.entries(folder)
    labels = _labels(entries)
    files = source.own(entries)
    splits = by_split(files, folder)
    if not splits:
        folders = first_named({entry.name.lower(): entry for entry in entries if entry.folder})
        splits = {split: _shards(source, entry.path) for split, entry in folders.items()}
    if splits and "train" not in splits:
        missing = storage.join(folder, f"train{source.suffixes[0]}")
        raise UserError(f"{source.written}: {missing} does not exist")
    if not splits:
        splits = {"all": files or _shards(source, folder)}
    return Found(
        {
            split: source.records([entry.path for entry in found], folder if split == "all" else f"{folder} ({split})")
            for split, found in splits.items()
        },
        labels,
    )


def _shards(source: _Source, folder: str) -> list[Entry]:
    entries = storage.entries(folder)
    if found := source.own(entries):
        return found
    others = ", ".join(entry.name for entry in entries[:3]) + (", ..." if len(entries) > 3 else "")
    raise UserError(
        f"{source.written}: {folder} has no {source.scheme} files ({', '.join(source.suffixes)}); it "
        + (f"has {others}" if others else "is empty")
    )


def _in_glob(source: _Source, pattern: str) -> Found:
    found = storage.matches(pattern)
    files = _once(entry for entry in found if not entry.folder)
    if not files:
        raise UserError(f"{source.written}: {pattern} matches {'only folders' if found else 'no file'}")
    for entry in files:
        other = next((name for name, one in _FORMATS.items() if _has_suffix(entry.name, one)), source.scheme)
        if other != source.scheme and not _has_suffix(entry.name, _FORMATS[source.scheme]):
            raise UserError(f"{source.written}: {entry.path} is a {other} file; expected {source.scheme} files only")
    splits = by_split(files, pattern)
    if len(splits) < 2:
        return Found({"all": source.records([entry.path for entry in files], pattern)})
    placed = {entry for entries in splits.values() for entry in entries}
    for entry in files:
        if entry not in placed:
            named = ", ".join(splits)
            raise UserError(f"{source.written} matches files of the splits {named}, and {entry.path}, which is of none")
    if "train" not in splits:
        raise UserError(f"{source.written} matches files of the splits {', '.join(splits)}, but none of train")
    return Found(
        {
            split: source.records([entry.path for entry in entries], f"{pattern} ({split})")
            for split, entries in splits.items()
        }
    )


def _labels(entries: Sequence[Entry]) -> tuple[str, ...]:
    entry = next((entry for entry in entries if entry.name == "labels.json"), None)
    if entry is None:
        return ()
    content = b""
    for block in without_mark(streams.blocks(entry.path)):
        content += block
        if len(content) > _LABELS:
            raise UserError(f"{entry.path} has more than {_LABELS // 2**20} MiB; expected a JSON list of label names")
    try:
        labels = parse_json(content.decode("utf-8"), entry.path)
    except UnicodeDecodeError as error:
        raise UserError(f"{entry.path} is not UTF-8 text") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{entry.path}: expected a JSON list of label names")
    return tuple(labels)


# ---------------------------------------------------------------- names


def _once(entries: Iterable[Entry]) -> list[Entry]:
    """The entries sorted by path; of files with the same name, the plain one, or the first of the compressed ones."""
    found: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.path):
        found.setdefault(bare(entry.path), entry)
    return list(found.values())


def _refuse_folders(entries: Iterable[Entry]) -> None:
    for entry in entries:
        if entry.folder:
            raise UserError(f"cannot read {entry.path}: is a directory")


def _has_suffix(name: str, form: Format) -> bool:
    return any(bare(name).lower().endswith(suffixes) for suffixes in form.suffixes)
