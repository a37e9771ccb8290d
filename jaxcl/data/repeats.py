"""Rows that occur more than once: within a split, in training and test, in several tasks."""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt64

from jaxcl.data.cache import Cache, agreed
from jaxcl.data.split import JoinedRows, ListRows, Rows, StreamedRows

Hashes = UInt64[np.ndarray, " rows"]


def row_hash(row: Mapping[str, str]) -> int:
    """64 bits that are equal for rows whose texts differ at most in case, white space and the way accents are composed.

    >>> row_hash({"text": "One  row"}) == row_hash({"text": " one row"}) != row_hash({"text": "onerow"})
    True
    """
    parts = [f"{name}\0{' '.join(unicodedata.normalize('NFC', row[name]).casefold().split())}" for name in sorted(row)]
    content = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def row_hashes(rows: Rows, cache: Cache | None = None) -> Hashes:
    """`row_hash` of all rows, in their order; the cache keeps those of streamed rows."""
    if isinstance(rows, JoinedRows):
        return np.concatenate([row_hashes(part, cache) for part in rows.parts])
    if cache is None or not isinstance(rows, StreamedRows):
        return np.fromiter(map(row_hash, rows), np.uint64)

    paths = cache.build("hashes", rows.key, len(rows.parts), functools.partial(_write, rows), ".npy")
    return np.concatenate([np.load(path) for path in paths])


def _write(rows: StreamedRows, part: int, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.fromiter((row_hash(row) for _, row in rows.part(part)), np.uint64))


def first_ones(hashes: Hashes) -> np.ndarray:
    """The numbers of the rows that are not a repetition of an earlier one, increasing.

    >>> first_ones(np.array([7, 9, 7, 8], np.uint64)).tolist()
    [0, 1, 3]
    """
    return np.sort(np.unique(hashes, return_index=True)[1])


def without_repeats(rows: Rows, cache: Cache | None = None) -> Rows:
    """The rows without those that repeat an earlier one."""
    kept = first_ones(row_hashes(rows, cache))
    if agreed(cache, len(kept) == len(rows)):
        return rows
    if cache is None or not isinstance(rows, StreamedRows):
        return ListRows(rows.pick(kept.tolist()))
    return rows.choose(kept, {"without": "repeats"}, cache)


class Overlap(NamedTuple):
    """Rows that a split shares with another.

    Attributes:
      of: the split that the rows are counted in.
      other: the split that holds them, too; the same split for rows that repeat an earlier one.
      rows: number of rows.
    """

    of: str
    other: str
    rows: int


def overlaps(splits: Mapping[str, Hashes], pairs: Sequence[tuple[str, str]]) -> list[Overlap]:
    """Counts of shared rows, without those that are 0.

    Args:
      splits: `row_hashes` by the name of a split.
      pairs: names of two splits, or of one twice.

    >>> overlaps({"a": np.array([1, 1, 2], np.uint64), "b": np.array([2], np.uint64)}, [("a", "a"), ("a", "b")])
    [Overlap(of='a', other='a', rows=1), Overlap(of='a', other='b', rows=1)]
    """
    found = []
    for of, other in pairs:
        count = len(splits[of]) - len(np.unique(splits[of]))
        if of != other:
            count = int(np.isin(splits[of], splits[other]).sum())
        if count:
            found.append(Overlap(of, other, count))
    return found
