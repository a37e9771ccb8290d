"""Sequences of integers of different lengths in one flat array."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int


class Ragged:
    """Integer sequences of different lengths.

    Attributes:
      values: all integers, one sequence after another.
      offsets: where each sequence begins in `values`, and where the last one ends.

    >>> ragged = Ragged.of([[5, 6], [], [7]])
    >>> len(ragged), ragged[0].tolist(), ragged.lengths.tolist()
    (3, [5, 6], [2, 0, 1])
    """

    def __init__(self, values: Int[np.ndarray, " total"], offsets: Int[np.ndarray, " sequences+1"]) -> None:
        self.values = values
        self.offsets = offsets

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]], dtype: np.typing.DTypeLike = np.int32) -> Ragged:
        """Sequences copied into one array.

        Args:
          sequences: the sequences.
          dtype: integer type of the values.
        """
        kept = list(sequences)
        lengths = np.fromiter(map(len, kept), np.int64, len(kept))
        values = np.fromiter(itertools.chain.from_iterable(kept), dtype, int(lengths.sum()))
        return cls.cut(values, lengths)

    @classmethod
    def cut(cls, values: Int[np.ndarray, " total"], lengths: Int[np.ndarray, " sequences"]) -> Ragged:
        """A flat array cut into sequences of the given lengths."""
        return cls(values, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))

    @classmethod
    def of_arrays(cls, arrays: Sequence[Int[np.ndarray, " values"]], dtype: np.typing.DTypeLike) -> Ragged:
        """`of` for sequences that are arrays of this type, which are joined as they are."""
        lengths = np.array([len(one) for one in arrays], np.int64)
        return cls.cut(np.concatenate([np.zeros(0, dtype), *arrays]), lengths)

    @classmethod
    def joined(cls, parts: Sequence[Ragged]) -> Ragged:
        """The sequences of several, one after another; at least one part."""
        values = np.concatenate([part.flat for part in parts])
        return cls.cut(values, np.concatenate([part.lengths for part in parts]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Int[np.ndarray, " tokens"]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> Int[np.ndarray, " sequences"]:
        """Length of each sequence."""
        return np.diff(self.offsets)

    @property
    def flat(self) -> Int[np.ndarray, " total"]:
        """The values of these sequences alone."""
        return self.values[self.offsets[0] : self.offsets[-1]]

    def take(self, order: Int[np.ndarray, " chosen"]) -> Ragged:
        """The sequences of the given numbers, in that order.

        >>> [one.tolist() for one in Ragged.of([[5, 6], [7], [8]]).take(np.array([2, 0]))]
        [[8], [5, 6]]
        """
        return self._pieces(self.offsets[:-1][order], self.lengths[order])

    def heads(self, length: int) -> Ragged:
        """The first `length` values of each sequence."""
        return self._pieces(self.offsets[:-1], np.minimum(self.lengths, length))

    def split(self, length: int) -> Ragged:
        """Each sequence as pieces of `length` values; the last one of each may be shorter.

        >>> [one.tolist() for one in Ragged.of([[1, 2, 3], [4]]).split(2)]
        [[1, 2], [3], [4]]
        """
        counts = -(-self.lengths // length)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(self.offsets[:-1], counts) + number * length
        return self._pieces(starts, np.minimum(length, np.repeat(self.offsets[1:], counts) - starts))

    def framed(self, before: Sequence[int], after: Sequence[int]) -> Ragged:
        """Each sequence between `before` and `after`.

        >>> [one.tolist() for one in Ragged.of([[5, 6], []]).framed([1], [2])]
        [[1, 5, 6, 2], [1, 2]]
        """
        found = Ragged.cut(self.values, self.lengths + len(before) + len(after))
        found.values = np.empty(found.offsets[-1], self.values.dtype)
        inner = np.ones(len(found.values), bool)
        places = [(found.offsets[:-1], index, value) for index, value in enumerate(before)]
        places += [(found.offsets[1:], index - len(after), value) for index, value in enumerate(after)]
        for start, shift, value in places:
            found.values[start + shift] = value
            inner[start + shift] = False
        found.values[inner] = self.flat
        return found

    def _pieces(self, starts: Int[np.ndarray, " pieces"], lengths: Int[np.ndarray, " pieces"]) -> Ragged:
        found = Ragged.cut(self.values, lengths)
        index = np.arange(found.offsets[-1]) + np.repeat(starts - found.offsets[:-1], lengths)
        found.values = self.values[index]
        return found
