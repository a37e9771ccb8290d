"""Pieces of different lengths in few rows of fixed length."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs pieces into few rows by best-fit decreasing.

    Long pieces go first, each into the fullest row that still has room. The result depends only on the lengths, so all
    processes have the same rows, and an iterator's position in them is one number.

    Args:
      lengths: tokens per piece, from 1 to `capacity`.
      capacity: tokens per row.

    Returns:
      The indices of the pieces in each row.

    >>> pack([3, 5, 2, 4], capacity=7)
    [[1, 2], [3, 0]]
    """
    rows: list[list[int]] = []
    free: list[list[int]] = [[] for _ in range(capacity + 1)]  # free[n]: rows with n tokens left
    spaces = 0  # bit n is set if free[n] is not empty
    for piece in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[piece]
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = free[space].pop()
            if not free[space]:
                spaces &= ~(1 << space)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = space - length
        if left:
            free[left].append(row)
            spaces |= 1 << left
    return rows
