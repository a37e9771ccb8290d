"""A state of a run folder: what belongs to it, by size and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxcl.errors import UserError

FOLDER, FILES = "states", "files"
_FORMAT = 1
_CHUNK = 2**20
_DIGEST = re.compile("[0-9a-f]{64}")
_NO_NAME = re.compile("[\0\ud800-\udfff]")  # what no file system has in names
_LONGEST, _LONGEST_PART = 2**11, 255  # bytes of a name
_FAR = 2.0**36  # seconds: beyond the year 4000
# What is being written, and what belongs to one machine.
_UNFINISHED = (".tmp", ".partial")
_TEMPORARY = "orbax-checkpoint-tmp"


class Damaged(UserError):
    """What is at the URL is not what was written there."""


class File(NamedTuple):
    """A file of a state.

    Attributes:
      size: bytes.
      digest: SHA-256 of its content, in hexadecimal digits.
      changed: when it was written, in seconds since 1970.
    """

    size: int
    digest: str
    changed: float

    def place(self, name: str) -> str:
        """The object that holds its content: another content has another one."""
        return f"{FILES}/{name}.{self.digest[:32]}"


class State(NamedTuple):
    """A state of a run folder.

    Attributes:
      number: its number, increasing.
      identity: tells it from other states of the same number.
      files: the folder's files by name, with `/` between its parts.
    """

    number: int
    identity: str
    files: Mapping[str, File]

    @property
    def name(self) -> str:
        """The object that holds it."""
        return f"{FOLDER}/{self.number:08d}.json"

    def encode(self) -> bytes:
        """Its content as an object, with a checksum."""
        content = json.dumps({**self._asdict(), "format": _FORMAT, "files": dict(self.files)}, indent=0).encode()
        return hashlib.sha256(content).hexdigest().encode() + b"\n" + content

    @classmethod
    def decode(cls, content: bytes, where: str) -> State:
        """A state from an object.

        Raises:
          Damaged: it is not as it was written.
          UserError: it is of a later version, or names files outside a run folder.
        """
        digest, _, rest = content.partition(b"\n")
        if digest.decode(errors="replace") != hashlib.sha256(rest).hexdigest():
            raise Damaged(f"{where} is damaged")
        try:
            read = json.loads(rest)
            if read["format"] != _FORMAT:
                raise UserError(f"{where} was written by another version of jaxcl")
            files = {name: _file(*one) for name, one in read["files"].items() if _check_name(name, where)}
            folders = {name[: cut.start()] for name in files for cut in re.finditer("/", name)}
            if both := folders & files.keys():
                raise UserError(f"{where} names {min(both)!r} as a file and as a folder")
            return cls(int(read["number"]), str(read["identity"]), files)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            raise Damaged(f"{where} is damaged") from None


def number_of(name: str) -> int:
    """The number in the name of a state's object; -1 for another object.

    >>> number_of("states/00000012.json"), number_of("states/notes.txt")
    (12, -1)
    """
    digits = name.removeprefix(f"{FOLDER}/").removesuffix(".json")
    return int(digits) if digits.isascii() and digits.isdecimal() else -1


def measure(path: Path) -> File:
    """Size, digest and time of a local file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return File(size, digest.hexdigest(), path.stat().st_mtime)


def names_in(folder: Path, under: str = "") -> Iterator[str]:
    """The names of a run folder's files, without those that are being written and those of this machine alone.

    Args:
      folder: the run folder.
      under: only those in this folder of it.
    """
    for parent, folders, files in os.walk(folder / under):
        inner = Path(parent).relative_to(folder)
        if not inner.parts:
            folders[:] = [name for name in folders if not name.startswith(".")]
        for file in sorted(files):
            name = (inner / file).as_posix()
            if not (name.startswith(".") or _is_unfinished(name) or Path(parent, file).is_symlink()):
                yield name


def _is_unfinished(name: str) -> bool:
    return name.endswith(_UNFINISHED) or _TEMPORARY in name


def _file(size: Any, digest: Any, changed: Any) -> File:
    """A file as a state describes it. Names of files are made of the digest, and times are set."""
    known = type(size) is int and 0 <= size < 2**63 and isinstance(changed, int | float) and abs(changed) < _FAR
    if not (known and isinstance(digest, str) and _DIGEST.fullmatch(digest)):
        raise ValueError("no file")
    return File(size, digest, float(changed))


def _check_name(name: str, where: str) -> bool:
    parts = name.split("/")
    sizes = [len(part.encode(errors="replace")) for part in (name, *parts)]
    too_long = sizes[0] > _LONGEST or max(sizes[1:]) > _LONGEST_PART
    odd = name.startswith(".") or "\\" in name or any(part in ("", ".", "..") for part in parts)
    if odd or too_long or _NO_NAME.search(name):
        raise UserError(f"{where} names {name[:_LONGEST_PART]!r}, which is not a file of a run folder")
    return True
