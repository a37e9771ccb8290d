"""Several pairs or conversations per row, as segments that do not attend to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxcl.data.mixture import MixedRows
from jaxcl.data.packing import pack
from jaxcl.data.pairs import PairRows
from jaxcl.data.plan import Shape
from jaxcl.data.ragged import Ragged
from jaxcl.data.rows import EncodedRows, Noise, RowFields, blank, place

# Examples that are packed together, so that neither memory nor time grows faster than their number.
_TOGETHER = 2**17


class PackedPairs(EncodedRows):
    """Encoded pairs, several per row.

    Every example is a segment whose positions count from 0, and has the scored positions and weights that it has alone.
    A step's loss is therefore that of the same examples in rows of their own. An example belongs to the same row in
    every epoch.

    Attributes:
      rows: the examples.
      length: tokens of a row.
      members: numbers of the examples in each row.
      scored: scored positions of a row; those of the fullest row, unless `pack_pairs` has raised it.
    """

    group = "packed pairs"

    def __init__(self, rows: PairRows, length: int) -> None:
        """Plans the rows.

        Args:
          rows: the examples; none is longer than `length`.
          length: tokens of a row.
        """
        self.rows = rows
        self.length = length
        self.name = rows.name
        self.task = rows.task
        lengths = rows.sizes[:, 0]
        self.members = Ragged.of(
            [first + example for example in row]
            for first in range(0, len(rows), _TOGETHER)
            for row in pack(lengths[first : first + _TOGETHER].tolist(), length)
        )
        self._sizes = np.add.reduceat(rows.sizes[self.members.values], self.members.offsets[:-1], axis=0)
        self.scored = int(self._sizes[:, 1].max())

    @property
    def sizes(self) -> Int[np.ndarray, "examples 2"]:
        """Tokens and scored positions per row."""
        return self._sizes

    @property
    def units(self) -> int:
        """Number of examples."""
        return len(self.rows)

    def shapes(self, others: Sequence[PackedPairs]) -> list[Shape]:
        """One shape."""
        return [Shape(self.length, max(one.scored for one in (self, *others)))]

    def row(self, index: int, shape: Shape, noise: Noise) -> RowFields:
        """One row, see `EncodedRows.row`; `noise` is not used."""
        row = blank(shape, self.rows.pad_id)
        if index < 0:
            return row
        found = [self.rows.learned(example) for example in self.members[index].tolist()]
        lengths = np.array([len(tokens) for tokens, _ in found])
        tokens = np.concatenate([tokens for tokens, _ in found])
        place(row, tokens, lengths)
        starts = np.cumsum(lengths) - lengths
        at = np.concatenate([start + learned for start, (_, learned) in zip(starts, found, strict=True)])
        row["predict"][: len(at)] = at - 1
        row["targets"][: len(at)] = tokens[at]
        row["weights"][: len(at)] = 1
        return row

    def describe(self) -> dict[str, Any]:
        """Those of the examples, the number of rows that hold them, and their fill rate."""
        fill = self.total / (len(self) * self.length)
        return {**self.rows.describe(), "packed_rows": len(self), "fill": round(fill, 4)}


def pack_pairs(tasks: Mapping[int, EncodedRows], length: int) -> dict[int, EncodedRows]:
    """The examples of tasks, several per row where they are pairs; all tasks get rows of one shape.

    Args:
      tasks: encoded examples by task, none of them longer than `length`.
      length: tokens of a row.
    """
    packed: list[PackedPairs] = []

    def change(rows: EncodedRows) -> EncodedRows:
        if isinstance(rows, MixedRows):
            return rows.changed(change)
        if not isinstance(rows, PairRows):
            return rows
        packed.append(PackedPairs(rows, length))
        return packed[-1]

    found = {task: change(rows) for task, rows in tasks.items()}
    for one in packed:
        one.scored = max(other.scored for other in packed)
    return found


__all__ = ["PackedPairs", "pack_pairs"]
