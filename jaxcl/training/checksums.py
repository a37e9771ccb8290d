"""Checksums of a checkpoint's files, stored in it before it is complete: a flipped bit is found before it is used."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep
from typing import TypeVar

from jaxcl.errors import UserError

FILE = "checksums.json"
# Beginnings of names of what Orbax and file systems put beside the subfolders.
_OTHERS = (FILE, "_", ".", "commit_success")
_CHUNK = 2**20
# Seconds between attempts to read a file: storage that is busy or starts again mends itself.
_WAITS = (0.1, 0.5, 2.0)
# What it means that a file is not there, or something else is in its place.
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

T = TypeVar("T")


class Damaged(UserError):
    """A checkpoint is not as it was written: a file is missing, has other content, or does not belong to it."""


def write_checksums(folder: Path) -> None:
    """Writes size and CRC-32 of every file in the subfolders of a checkpoint into it.

    Beside them are `_CHECKPOINT_METADATA`, which a thread of Orbax may still be writing at this moment and writes again
    with the time of the commit, and `commit_success.txt`, which follows. They cannot be compared, and need not be: what
    they say (handlers, times) is not used, and a checkpoint without them is restored as well.

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
      Damaged: a file is missing, has other content, or does not belong to the checkpoint; names it.
      UserError: a file cannot be read, which says nothing about what it holds.
    """
    content = read_again(folder / FILE, Path.read_bytes)
    try:
        expected = {str(name): tuple(pair) for name, pair in json.loads(content).items()}
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise Damaged(f"{folder / FILE} is damaged") from None
    found = dict(read_again(folder, lambda folder: [*_files(folder), *_strays(folder)]))
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise Damaged(f"{folder / name} is missing")
        if name not in expected:
            raise Damaged(f"{found[name]} does not belong there")
        if read_again(found[name], _measure) != expected[name]:
            raise Damaged(f"{found[name]} is damaged (other content than when it was written)")


def read_again(path: Path, read: Callable[[Path], T]) -> T:
    """Reads a file of a checkpoint; if the storage fails, a few times.

    Args:
      path: the file.
      read: reads it as a whole.

    Raises:
      Damaged: it is missing.
      UserError: the storage still fails.
    """
    for wait in (*_WAITS, None):
        try:
            return read(path)
        except _GONE:
            raise Damaged(f"{path} is missing") from None
        except OSError as error:
            if wait is None:
                words = f"{path} cannot be read: {error.strerror or error} ({len(_WAITS) + 1} attempts)"
                raise UserError(f"{words}; nothing was removed, try again when the storage works") from None
            sleep(wait)
    raise AssertionError


def _strays(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files beside the subfolders that neither jaxcl nor Orbax nor a file system puts there."""
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith(_OTHERS):
            yield path.name, path


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files in subfolders."""
    for path in folder.glob("*/**/*"):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _measure(path: Path) -> tuple[int, int]:
    size = crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc
