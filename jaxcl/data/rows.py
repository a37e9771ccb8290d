"""Encoded examples with random access, from which a pipeline builds its batches."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxcl.data.examples import ExampleTable
from jaxcl.data.plan import Shape

#: Seeds of everything random about a row (which tokens are masked).
Noise = tuple[int, ...]


class RowFields(TypedDict):
    """Fields of an encoded row, all int32 but `weights` (float32) and `pixels` (uint8).

    `jaxcl.models.batch.Batch` says what they hold; of `pixels` and `image_index`, `jaxcl.models.images.Images`.
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
    pixels: NotRequired[UInt8[np.ndarray, "*batch images tile tile 3"]]
    image_index: NotRequired[Int[np.ndarray, "*batch length"]]


class HostBatch(RowFields):
    """This process's rows of a batch, stacked, and where they come from."""

    task: Int[np.ndarray, " batch"]
    example: Int[np.ndarray, " batch"]
    teacher: NotRequired[Mapping[str, np.ndarray] | None]
    origin: NotRequired[str]
    memory: NotRequired[HostBatch | None]


class EncodedRows(abc.ABC):
    """The encoded examples of one split of one task.

    Attributes:
      group: name of the kind of rows; only rows of the same group share a batch.
      name: name of the task.
      task: index of the task.
      table: the examples as token sequences; only rows that are read from one have it.
    """

    group: str
    name: str
    task: int
    table: ExampleTable

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    @abc.abstractmethod
    def sizes(self) -> Int[np.ndarray, "examples 2"]:
        """Tokens and scored positions per example."""

    @property
    def total(self) -> int:
        """Tokens of all examples."""
        return int(self.sizes[:, 0].sum())

    @property
    def units(self) -> int:
        """Number of examples; more than there are rows if a row holds several."""
        return len(self)

    @property
    def examples(self) -> ExampleTable:
        """The examples of all sources as token sequences."""
        return ExampleTable([shard for leaf in self.leaves() for shard in leaf.table.shards])

    def leaves(self) -> list[EncodedRows]:
        """The sources that these rows are a mixture of, or only themselves."""
        return [self]

    def smallest(self, shapes: Sequence[Shape]) -> Int[np.ndarray, " examples"]:
        """Number of the smallest shape that each example fits, uint8; `len(shapes)` if it fits none.

        Args:
          shapes: shapes that increase in both numbers.
        """
        limits = np.array([(shape.length, shape.predict or 0) for shape in shapes])
        needed = [np.searchsorted(limits[:, axis], self.sizes[:, axis]) for axis in (0, 1)]
        return np.maximum(*needed).astype(np.uint8)

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


def place(row: RowFields, tokens: Int[np.ndarray, " tokens"], lengths: Int[np.ndarray, " segments"]) -> int:
    """Writes tokens into a blank row as segments 1, 2, ... of the given lengths; returns the number of tokens."""
    count = len(tokens)
    row["tokens"][:count] = tokens
    if len(lengths) == 1:
        row["segments"][:count] = 1
        row["positions"][:count] = np.arange(count)
    else:
        lengths = lengths.astype(np.int64)
        row["segments"][:count] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        row["positions"][:count] = np.arange(count) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return count
