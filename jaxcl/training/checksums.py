"""Checksums of a checkpoint's files, stored in it before it is complete: a flipped bit is found before it is used."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from jaxcl.errors import UserError

FILE = "checksums.json"
_CHUNK = 2**20


def write_checksums(folder: Path) -> None:
    """Writes size and CRC-32 of every file in the subfolders of a checkpoint into it.

    Args:
      folder: the checkpoint's folder.
    """
    sums = {name: _measure(path) for name, path in _files(folder)}
    (folder / FILE).write_text(json.dumps(sums), encoding="utf-8")


def check_checksums(folder: Path) -> None:
    """Compares a checkpoint with its checksums.

    Args:
      folder: the checkpoint's folder.

    Raises:
      UserError: a file is missing, has other content, or does not belong to the checkpoint; names it.
    """
    try:
        sums = json.loads((folder / FILE).read_text(encoding="utf-8"))
        expected = {str(name): tuple(pair) for name, pair in sums.items()}
    except OSError as error:
        raise UserError(f"{folder / FILE}: {error.strerror or error}") from None
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{folder / FILE} is damaged") from None
    found = dict(_files(folder))
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise UserError(f"{folder / name} is missing")
        if name not in expected:
            raise UserError(f"{found[name]} does not belong there")
        try:
            measured = _measure(found[name])
        except OSError as error:
            raise UserError(f"{found[name]}: {error.strerror or error}") from None
        if measured != expected[name]:
            raise UserError(f"{found[name]} is damaged (other content than when it was written)")


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files in subfolders: Orbax writes those beside them later, when the checkpoint is complete."""
    for path in folder.glob("*/**/*"):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _measure(path: Path) -> tuple[int, int]:
    size = crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc
