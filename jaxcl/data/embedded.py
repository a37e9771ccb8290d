"""What embedded sources have in common: rows by split, where a hash of an example's content decides its split.

So the splits are the same on every machine and do not depend on other examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

# Share of examples in dev and in test.
_DEV, _TEST = 0.1, 0.1

Row = dict[str, Any]


class Embedded(NamedTuple):
    """An embedded source.

    Attributes:
      splits: rows by split: `train`, `dev` and `test`.
      labels: class names of a labelled source.
    """

    splits: dict[str, list[Row]]
    labels: tuple[str, ...] = ()


def rank(text: str) -> float:
    """A number in [0, 1) that depends only on `text`."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6]) / 2**48


def split_rows(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows by split.

    Args:
      rows: the rows.
      key: what of a row decides its split: rows with the same are in the same one.
    """
    found: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    for row in rows:
        place = rank("split " + key(row))
        found["test" if place < _TEST else "dev" if place < _TEST + _DEV else "train"].append(row)
    return found
