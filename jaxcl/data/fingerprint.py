"""Fingerprints of rows and files, by which a run recognises its data wherever it is stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

_BYTES = 16
# Files up to `_WHOLE` bytes are hashed whole; of larger files, `_BLOCKS` blocks, spread evenly.
_WHOLE = 32 * 2**20
_BLOCK, _BLOCKS = 2**16, 512


class RowsPrint(TypedDict):
    """Fingerprint of rows.

    Attributes:
      rows: number of rows.
      ordered: hash of the rows in their order.
      content: hash that does not depend on their order.
    """

    rows: int
    ordered: str
    content: str


def rows_print(rows: Sequence[Mapping[str, str]]) -> RowsPrint:
    """Fingerprint of rows, from the names and values of their fields.

    Args:
      rows: the rows.

    >>> one, two = {"text": "a"}, {"text": "b"}
    >>> rows_print([one, two])["content"] == rows_print([two, one])["content"]
    True
    >>> rows_print([one, two])["ordered"] == rows_print([two, one])["ordered"]
    False
    """
    ordered = hashlib.blake2b(digest_size=_BYTES)
    content = 0
    for row in rows:
        digest = _digest(part for name in sorted(row) for part in (name, row[name]))
        ordered.update(digest)
        content += int.from_bytes(digest, "big")
    return {"rows": len(rows), "ordered": ordered.hexdigest(), "content": f"{content % 2 ** (8 * _BYTES):032x}"}


def texts_print(texts: Iterable[str]) -> str:
    """Hash of some texts in their order.

    Args:
      texts: the texts.

    >>> texts_print(["ab", "c"]) == texts_print(["a", "bc"])
    False
    """
    return _digest(texts).hex()


def files_print(files: Iterable[Path]) -> str:
    """Hash of files, independent of the folder that they are in.

    Files up to 32 MiB are read whole. Of larger ones, the size and 512 blocks of 64 KiB are read, spread evenly
    from the first byte to the last: a change of a whole tensor is noticed, that of a single number is probably not.

    Args:
      files: the files; the order does not matter.

    Raises:
      OSError: a file cannot be read.
    """
    whole = hashlib.blake2b(digest_size=_BYTES)
    for path in sorted(files):
        size = path.stat().st_size
        whole.update(f"{len(path.name)} {path.name} {size} ".encode("utf-8", "surrogateescape"))
        with open(path, "rb") as file:
            for start in _starts(size):
                file.seek(start)
                whole.update(file.read(_BLOCK))
    return whole.hexdigest()


def _starts(size: int) -> Iterable[int]:
    if size <= _WHOLE:
        return range(0, size, _BLOCK)
    return ((size - _BLOCK) * index // (_BLOCKS - 1) for index in range(_BLOCKS))


def _digest(texts: Iterable[str]) -> bytes:
    found = hashlib.blake2b(digest_size=_BYTES)
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        found.update(len(content).to_bytes(8, "big"))
        found.update(content)
    return found.digest()
