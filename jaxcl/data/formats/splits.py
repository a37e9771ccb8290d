"""Which split a file is of, from its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from jaxcl.data.formats.storage import Entry
from jaxcl.data.formats.streams import bare
from jaxcl.errors import UserError

T = TypeVar("T")

# What a split is called; of its names, the first that occurs counts.
_NAMES = {"train": ("train",), "dev": ("dev", "eval", "validation", "valid", "val"), "test": ("test",)}
# A split's name, then perhaps the name of a variant (train_sft), then perhaps the number of a shard, as in train-3,
# train-00001-of-00012 or train-00000-of-00001-0123456789abcdef.
_STEM = re.compile(
    r"(train|dev|eval|validation|valid|val|test)([-_.][a-z][\w.-]*?)?(?:[-_.]?\d+(?:-of-\d+)?(?:-[0-9a-f]{8,})?)?",
    re.IGNORECASE,
)


def by_split(files: Sequence[Entry], where: str) -> dict[str, list[Entry]]:
    """Files by the split that they are named after; empty if no names say it.

    `train.jsonl` and `train-00000-of-00002.jsonl` are of the training split, whatever else there is: files that are
    named otherwise are left out. `train_a.jsonl` is of it only where `test_a.jsonl` or `dev_a.jsonl` is there too.

    Args:
      files: the files.
      where: their folder or glob, for messages.

    Raises:
      UserError: files are named `train_a` and `test_a`, and others are named in other ways: what to do with those would
        be a guess, and a wrong one would train on test rows.
    """
    named: dict[str, dict[str, list[Entry]]] = {}  # by variant and name
    for entry in files:
        if match := _STEM.fullmatch(bare(entry.name).rpartition(".")[0]):
            named.setdefault((match[2] or "").lower(), {}).setdefault(match[1].lower(), []).append(entry)
    if "" in named:
        return first_named(named[""])
    if len({split for words in named.values() for split in first_named(words)}) < 2:
        return {}
    found = first_named(next(iter(named.values())))
    if len(named) > 1 or sum(map(len, found.values())) < len(files):
        names = ", ".join(entry.name for entry in files[:4]) + (", ..." if len(files) > 4 else "")
        raise UserError(f"{where}: which of its files belong together is unclear; choose them by a glob: {names}")
    return found


def first_named(named: Mapping[str, T]) -> dict[str, T]:
    """What is named after a split, by split; of several names of a split, the first in their order.

    >>> first_named({"validation": 1, "val": 2, "test": 3, "other": 4})
    {'dev': 1, 'test': 3}
    """
    chosen = {split: next((name for name in names if name in named), None) for split, names in _NAMES.items()}
    return {split: named[name] for split, name in chosen.items() if name is not None}
