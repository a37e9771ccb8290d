"""What a method stores with remembered rows: records of named arrays on disk, read one at a time.

A store is one ArrayRecord file. Its last record describes it: magic, version, what the store belongs to, fields, number
of records, their keys, and a digest of all of it. Arrays of a field share dtype and rank; their shapes may differ
between records, so padding is never stored. Each process writes a file for its own rows, and `TeacherStore.open` reads
several files as one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from jaxcl.data.files import replacing
from jaxcl.errors import UserError

_MAGIC = b"jaxcl-teacher\x00"
VERSION = 3  # 2: adds what a store belongs to; 3: coded attention rows hold their largest weight
# ArrayRecord compresses whole groups: groups of one record let a read fetch only that record.
_OPTIONS = "group_size:1"

_MOST_AXES = 8

Record = Mapping[str, np.ndarray]
About = Mapping[str, str | int]


def write_records(path: str | Path, records: Iterable[tuple[int, Record]], about: About | None = None) -> int:
    """Writes a store atomically; records are consumed one at a time.

    Args:
      path: the file.
      records: key (the example's number in its task) and arrays of each record. All have the same field names, dtypes
        and ranks.
      about: what the store belongs to, such as the task and the size of the model; checked by `TeacherStore.open`.

    Returns:
      Number of records written.

    Raises:
      UserError: the file cannot be written.
      ValueError: a record's fields differ from those of the first record, or a key appears twice.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    fields: dict[str, dict[str, Any]] | None = None
    keys: list[int] = []
    content = hashlib.sha256()
    with replacing(path) as temporary:
        try:
            writer = ArrayRecordWriter(str(temporary), _OPTIONS)
            try:
                for key, record in records:
                    found = {name: {"dtype": value.dtype.name, "rank": value.ndim} for name, value in record.items()}
                    if fields is None:
                        fields = found
                    if found != fields:
                        raise ValueError(f"record {key}: expected fields {fields}, got {found}")
                    keys.append(int(key))
                    packed = _pack(record, fields)
                    content.update(len(packed).to_bytes(8, "little"))
                    content.update(packed)
                    writer.write(packed)
                if len(set(keys)) != len(keys):
                    raise ValueError("write_records: expected every key only once")
                description = {
                    "version": VERSION,
                    "about": about or {},
                    "fields": fields or {},
                    "count": len(keys),
                    "keys": keys,
                }
                content.update(json.dumps(description, sort_keys=True).encode())
                description["digest"] = content.hexdigest()
                writer.write(_MAGIC + json.dumps(description).encode())
            finally:
                writer.close()
        except RuntimeError as error:  # the library's error for a failed write
            words = str(error).split(";")[0]
            raise UserError(f"cannot write {path}: {words}; the previous file is intact") from error
    return len(keys)


def store_digest(path: Path) -> str:
    """A SHA-256 in hexadecimal digits by which a store file is recognised.

    It is that of its records and their description, which the file says itself; of a file that does not, its own.

    Args:
      path: the file.

    Raises:
      UserError: it is missing, truncated, or not a store.
    """
    file = _File(path)
    if file.digest is not None:
        return file.digest
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


class TeacherStore:
    """Random access to the records of one or several store files.

    Attributes:
      keys: key of each record, by position.
      fields: dtype and rank per field.
    """

    def __init__(self, files: Sequence[_File]) -> None:
        self._files = list(files)
        self.fields = next((file.fields for file in self._files if file.keys), {})
        self.keys = [key for file in self._files for key in file.keys]
        self._places = [(number, at) for number, file in enumerate(self._files) for at in range(len(file.keys))]
        self._by_key = {key: position for position, key in enumerate(self.keys)}

    @classmethod
    def open(cls, paths: str | Path | Sequence[str | Path], about: About | None = None) -> TeacherStore:
        """Opens one file, or the files that the processes of a run wrote.

        Args:
          paths: the files.
          about: what they have to belong to, as given to `write_records`; `None`: anything.

        Raises:
          UserError: a file is missing, truncated, not a store or of another version, or the files do not belong
            together or not to `about`.
        """
        files = [_File(Path(path)) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        for file in files:
            for name, expected in (about or {}).items():
                if (found := file.about.get(name)) != expected:
                    raise UserError(f"{file.path} is the store of another run: {name} {found}, here {expected}")
        described = [file for file in files if file.keys]
        for file in described[1:]:
            if file.fields != described[0].fields:
                raise UserError(f"{file.path} has other fields than {described[0].path}: the stores are from two runs")
        store = cls(files)
        if len(store._by_key) != len(store.keys):
            raise UserError(f"{files[0].path} and the other stores hold an example twice: they are from two runs")
        return store

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: int) -> bool:
        return key in self._by_key

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        """The record at a position in `keys`."""
        number, at = self._places[position]
        return self._files[number].read(at)

    def get(self, key: int) -> dict[str, np.ndarray]:
        """The record of an example.

        Raises:
          UserError: there is no such record.
        """
        if key not in self._by_key:
            names = ", ".join(str(file.path) for file in self._files)
            raise UserError(f"{names}: no record of example {key}; the memory and the store do not belong together")
        return self[self._by_key[key]]


class _File:
    """One store file, opened and checked."""

    def __init__(self, path: Path) -> None:
        from array_record.python.array_record_module import ArrayRecordReader

        self.path = path
        if not path.is_file():
            raise UserError(f"{path} does not exist")
        try:
            self._reader = ArrayRecordReader(str(path))
            count = self._reader.num_records()
            last = self._reader.read([count - 1])[0] if count else b""
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"{path} is truncated, damaged or not a teacher store: {_first_line(error)}") from error
        if not last.startswith(_MAGIC):
            raise UserError(f"{path} is not a teacher store, or is incomplete")
        try:
            description = json.loads(last[len(_MAGIC) :])
        except (ValueError, RecursionError):
            description = None
        if not isinstance(description, dict):
            raise UserError(f"{path}: its description is damaged")
        if description.get("version") != VERSION:
            raise UserError(f"{path} has version {description.get('version')}; this program reads version {VERSION}")
        about, fields, keys, digest = (description.get(name) for name in ("about", "fields", "keys", "digest"))
        if not (isinstance(about, dict) and _are_fields(fields) and _are_keys(keys) and _is_digest(digest)):
            raise UserError(f"{path}: its description is damaged")
        self.about: About = about
        self.fields: dict[str, dict[str, Any]] = fields
        self.keys: list[int] = keys
        self.digest: str | None = digest  # files from before there were digests have none
        if count != len(self.keys) + 1:
            raise UserError(f"{path} holds {count - 1} records; its description says {len(self.keys)}")

    def read(self, position: int) -> dict[str, np.ndarray]:
        try:
            content = self._reader.read([position])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"{self.path} record {position} cannot be read: {_first_line(error)}") from error
        try:
            return _unpack(content, self.fields)
        except (struct.error, ValueError, OverflowError) as error:
            raise UserError(f"{self.path} record {position} does not hold what the store describes: {error}") from None


def _pack(record: Record, fields: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Shape and bytes of each field, in the order of `fields`, little-endian."""
    parts = []
    for name in fields:
        value = np.ascontiguousarray(record[name])
        parts.append(struct.pack(f"<{record[name].ndim}q", *record[name].shape))
        parts.append(value.tobytes())
    return b"".join(parts)


def _unpack(content: bytes, fields: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    record = {}
    start = 0
    for name, field in fields.items():
        shape = struct.unpack_from(f"<{field['rank']}q", content, start)
        start += 8 * len(shape)
        dtype = dtype_named(field["dtype"])
        if min(shape, default=0) < 0:
            raise ValueError(f"{name} has the shape {shape}")
        count = math.prod(shape)
        record[name] = np.frombuffer(content, dtype, count, start).reshape(shape)
        start += count * dtype.itemsize
    return record


def dtype_named(name: str) -> np.dtype:
    """The dtype with a name, one of `ml_dtypes` included.

    Raises:
      TypeError: there is none; numpy also knows other texts, and has a `SyntaxError` for some.
    """
    if not (isinstance(name, str) and name.isidentifier()):
        raise TypeError(f"{name!r} is no dtype")
    return np.dtype(getattr(ml_dtypes, name, name))


def _is_digest(value: Any) -> TypeGuard[str | None]:
    return value is None or (isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None)


def _are_keys(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(key) is int for key in value)


def _are_fields(value: Any) -> TypeGuard[dict[str, dict[str, Any]]]:
    """Whether a description's fields are what `write_records` writes."""
    if not isinstance(value, dict):
        return False
    for field in value.values():
        if not (isinstance(field, dict) and isinstance(field.get("dtype"), str) and type(field.get("rank")) is int):
            return False
        if not 0 <= field["rank"] <= _MOST_AXES:
            return False
        try:
            dtype = dtype_named(field["dtype"])
        except (TypeError, ValueError):
            return False
        if dtype.name != field["dtype"] or dtype.hasobject:
            return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
