"""Fingerprints of rows and files, by which a run recognises its data wherever it is stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, TypedDict

_BYTES = 16
_PRIME = 2**127 - 1
_BASE = 0x5BD1E995_9E3779B9_7F4A7C15_F39CC060 % _PRIME
#: Bytes of a block, and how many of them are read at most: files up to their product, 32 MiB, are read whole.
BLOCK, BLOCKS = 2**16, 512


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


class RowsHash:
    """Fingerprint of rows that are given one after another; those of parts can be joined.

    With digests `d_1 ... d_n` of the rows, `ordered` is `sum_i d_i x^(n-i)` and `content` is `sum_i d_i`, both modulo
    the prime `2^127 - 1`.
    """

    def __init__(self, rows: int = 0, ordered: int = 0, content: int = 0) -> None:
        self.rows, self._ordered, self._content = rows, ordered, content

    def add(self, row: Mapping[str, str]) -> None:
        """Adds a row."""
        digest = int.from_bytes(_digest(part for name in sorted(row) for part in (name, row[name])), "big")
        self._ordered = (self._ordered * _BASE + digest) % _PRIME
        self._content = (self._content + digest) % _PRIME
        self.rows += 1

    def join(self, other: RowsHash) -> RowsHash:
        """The fingerprint of these rows followed by others."""
        shifted = self._ordered * pow(_BASE, other.rows, _PRIME)
        return RowsHash(
            self.rows + other.rows, (shifted + other._ordered) % _PRIME, (self._content + other._content) % _PRIME
        )

    def result(self) -> RowsPrint:
        """The fingerprint."""
        return {"rows": self.rows, "ordered": f"{self._ordered:032x}", "content": f"{self._content:032x}"}

    @classmethod
    def read(cls, result: RowsPrint) -> RowsHash:
        """A fingerprint to which rows can be added."""
        return cls(result["rows"], int(result["ordered"], 16), int(result["content"], 16))


def rows_print(rows: Iterable[Mapping[str, str]]) -> RowsPrint:
    """Fingerprint of rows, from the names and values of their fields.

    Args:
      rows: the rows.

    >>> one, two = {"text": "a"}, {"text": "b"}
    >>> rows_print([one, two])["content"] == rows_print([two, one])["content"]
    True
    >>> rows_print([one, two])["ordered"] == rows_print([two, one])["ordered"]
    False
    """
    found = RowsHash()
    for row in rows:
        found.add(row)
    return found.result()


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
            for block in sampled(file, size):
                whole.update(block)
    return whole.hexdigest()


def sampled(file: BinaryIO, size: int, blocks: int | None = None) -> Iterator[bytes]:
    """The bytes of a file by which it is recognised: all of a small one; of a larger one some blocks, spread evenly.

    Args:
      file: the open file.
      size: its bytes.
      blocks: largest number of blocks of `BLOCK` bytes; none: `BLOCKS`.
    """
    blocks = BLOCKS if blocks is None else blocks
    starts: Iterable[int] = range(0, size, BLOCK)
    if size > blocks * BLOCK:
        starts = ((size - BLOCK) * index // (blocks - 1) for index in range(blocks))
    for start in starts:
        file.seek(start)
        yield file.read(BLOCK)


def _digest(texts: Iterable[str]) -> bytes:
    found = hashlib.blake2b(digest_size=_BYTES)
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        found.update(len(content).to_bytes(8, "big"))
        found.update(content)
    return found.digest()
