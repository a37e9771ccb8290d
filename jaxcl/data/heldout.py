"""Held-out splits that follow from the rows' content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TypeVar

Row = TypeVar("Row", bound=Mapping[str, str])


def rank(row: Mapping[str, str], seed: int) -> float:
    """A number in [0, 1) that depends only on the row and the seed.

    >>> 0 <= rank({"text": "a"}, 0) == rank({"text": "a"}, 0) != rank({"text": "a"}, 1)
    True
    """
    content = json.dumps([seed, sorted(row.items())]).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:6]) / 2**48


def hold_out(rows: Sequence[Row], share: float, seed: int, *, dev: bool) -> dict[str, list[Row]]:
    """Splits rows by a hash of their content.

    Equal rows are in the same split, and rows that are appended, removed or reordered do not move the others. The
    sizes are therefore only about `share`. Few rows are an exception: if no row falls into a split that should have
    some, the different row of the smallest rank does.

    Args:
      rows: the rows, whose order is kept.
      share: share of each held-out split, below 0.5.
      seed: another seed chooses other rows.
      dev: whether to hold out a development split too.

    Returns:
      Rows by split: `train`, `dev` and `test`. With fewer than two different rows, `test` is empty, with fewer than
      three `dev`.
    """
    ranks = [rank(row, seed) for row in rows]
    different = sorted(set(ranks))
    tested, developed = (sum(one < limit for one in different) for limit in (share, 2 * share))
    # Each split gets at least one different row, and training is left at least one.
    spare = len(different) - 1
    tested = min(max(tested, 1), spare) if spare > 0 else 0
    developed = min(max(developed, tested + 1), spare) if dev else tested
    split_of = dict.fromkeys(different, "train")
    split_of |= dict.fromkeys(different[:developed], "dev") | dict.fromkeys(different[:tested], "test")
    found: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    for row, one in zip(rows, ranks, strict=True):
        found[split_of[one]].append(row)
    return found
