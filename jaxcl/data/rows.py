"""Encoded examples with random access, from which a pipeline builds its batches."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
from jaxtyping import Float, Int

from jaxcl.data.plan import Shape

#: Seeds of everything random about a row (which tokens are masked).
Noise = tuple[int, ...]


class RowFields(TypedDict):
    """Fields of an encoded row, all int32 but `weights` (float32); `jaxcl.models.batch.Batch` says what they hold.

    In a `HostBatch` each has a leading batch axis, and what its rows lack is `None`.
    """

    tokens: Int[np.ndarray, "*batch length"]
    segments: Int[np.ndarray, "*batch length"]
    positions: Int[np.ndarray, "*batch length"]
    predict: NotRequired[Int[np.ndarray, "*batch predict"]]
    targets: Int[np.ndarray, "*batch predict"]
    weights: Float[np.ndarray, "*batch predict"]
    labels: NotRequired[Int[np.ndarray, "*batch"] | np.int32]
    types: NotRequired[Int[np.ndarray, "*batch length"]]


class HostBatch(RowFields):
    """This process's rows of a batch, stacked, and where they come from."""

    task: Int[np.ndarray, " batch"]
    example: Int[np.ndarray, " batch"]
    teacher: NotRequired[Mapping[str, np.ndarray] | None]
    origin: NotRequired[str]
    memory: NotRequired[HostBatch | None]


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


class EncodedRows(abc.ABC):
    """The encoded examples of one split of one task.

    Attributes:
      group: name of the kind of rows; only rows of the same group share a batch.
      name: name of the task.
      task: index of the task.
      sizes: tokens and scored positions per example, int `[examples, 2]`.
    """

    group: str
    name: str
    task: int
    sizes: Int[np.ndarray, "examples 2"]

    def __len__(self) -> int:
        return len(self.sizes)

    def number(self, index: int) -> int:
        """The example's number within the task's whole set."""
        return index

    @abc.abstractmethod
    def shapes(self, others: Sequence[Any]) -> list[Shape]:
        """Shapes for batches of these rows and `others` of the same group, increasing in both numbers."""

    @abc.abstractmethod
    def row(self, index: int, shape: Shape, noise: Noise) -> RowFields:
        """The fields of one row, without a batch axis; `index` -1 gives a filler row.

        Args:
          index: number of the example; -1 gives a filler row.
          shape: lengths of the row.
          noise: seed of what is random in the row: the same numbers give the same row.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Counts for the log and the report."""


def blank(shape: Shape, pad_id: int) -> RowFields:
    """A filler row: padding only, without a scored position."""
    scored = shape.length if shape.predict is None else shape.predict
    row: RowFields = {
        "tokens": np.full(shape.length, pad_id, np.int32),
        "segments": np.zeros(shape.length, np.int32),
        "positions": np.zeros(shape.length, np.int32),
        "targets": np.zeros(scored, np.int32),
        "weights": np.zeros(scored, np.float32),
    }
    if shape.predict is not None:
        row["predict"] = np.zeros(shape.predict, np.int32)
    return row


def place(row: RowFields, pieces: Sequence[Int[np.ndarray, " tokens"]]) -> int:
    """Writes `pieces` one after another into a blank row as segments 1, 2, ...; returns the number of tokens."""
    start = 0
    for number, piece in enumerate(pieces, 1):
        stop = start + len(piece)
        row["tokens"][start:stop] = piece
        row["segments"][start:stop] = number
        row["positions"][start:stop] = np.arange(len(piece))
        start = stop
    return start
