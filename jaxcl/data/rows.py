"""Encoded examples with random access: what a pipeline draws its batches from."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxcl.data.plan import Shape

Row = dict[str, Any]
#: Seeds of whatever is random about a row (which tokens are masked).
Noise = tuple[int, ...]


class Ragged:
    """Integer sequences of different lengths in one flat array.

    >>> ragged = Ragged([[5, 6], [], [7]])
    >>> len(ragged), ragged[0].tolist(), ragged.lengths.tolist()
    (3, [5, 6], [2, 0, 1])
    """

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        arrays = [np.asarray(sequence, np.int32) for sequence in sequences]
        self.values = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        self.offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays], dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Int[np.ndarray, " tokens"]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> Int[np.ndarray, " sequences"]:
        """Length of each sequence."""
        return np.diff(self.offsets)


class Rows(abc.ABC):
    """Examples of one split of one task, encoded.

    Attributes:
      group: rows of different groups never share a batch, because their batches are built differently.
      name: name of the task.
      task: index of the task.
      sizes: tokens and scored positions of each example, int `[examples, 2]`.
    """

    group: str
    name: str
    task: int
    sizes: Int[np.ndarray, "examples 2"]

    def __len__(self) -> int:
        return len(self.sizes)

    def number(self, index: int) -> int:
        """Number, within the task's training set, of the example at `index`."""
        return index

    @abc.abstractmethod
    def shapes(self, others: Sequence[Any]) -> list[Shape]:
        """Shapes for batches of these rows together with `others` of the same group, rising in both numbers."""

    @abc.abstractmethod
    def row(self, index: int, shape: Shape, noise: Noise) -> Row:
        """Fields of one row, without the batch axis; `index` -1 gives a filler row.

        Args:
          index: number of the example; -1 gives a filler row.
          shape: lengths of the row.
          noise: seed of what is random in the row: the same numbers give the same row.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Counts for the log and the report."""


def blank(shape: Shape, pad_id: int) -> Row:
    """A filler row: nothing is seen, nothing is scored."""
    scored = shape.length if shape.predict is None else shape.predict
    row = {
        "tokens": np.full(shape.length, pad_id, np.int32),
        "segments": np.zeros(shape.length, np.int32),
        "positions": np.zeros(shape.length, np.int32),
        "targets": np.zeros(scored, np.int32),
        "weights": np.zeros(scored, np.float32),
    }
    if shape.predict is not None:
        row["predict"] = np.zeros(shape.predict, np.int32)
    return row


def place(row: Row, pieces: Sequence[Int[np.ndarray, " tokens"]]) -> int:
    """Writes `pieces` side by side into a blank row as segments 1, 2, ...; returns the tokens written."""
    start = 0
    for number, piece in enumerate(pieces, 1):
        stop = start + len(piece)
        row["tokens"][start:stop] = piece
        row["segments"][start:stop] = number
        row["positions"][start:stop] = np.arange(len(piece))
        start = stop
    return start
