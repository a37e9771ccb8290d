"""Which examples go into which batch: pure functions of lengths, seed and epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Shape(NamedTuple):
    """Static shape of a row: tokens, scored positions (`None`: every position is scored), and tiles of images."""

    length: int
    predict: int | None
    images: int = 0


class Plan(NamedTuple):
    """The batches of one epoch.

    Attributes:
      shapes: index of each batch's shape.
      rows: examples of each batch; -1 for filler rows, which come last.
    """

    shapes: Int[np.ndarray, " steps"]
    rows: Int[np.ndarray, "steps batch"]


def plan_steps(buckets: Int[np.ndarray, " examples"], groups: Sequence[int], batch_size: int) -> int:
    """Number of batches per epoch: each group's examples divided by the batch size, rounded up.

    Args:
      buckets: index of the smallest shape that each example fits.
      groups: group of each shape; see `plan_epoch`.
      batch_size: rows in a batch.
    """
    counts = np.bincount(buckets, minlength=len(groups))
    totals = np.bincount(np.asarray(groups, np.int64), weights=counts).astype(np.int64)
    return int((-(-totals // batch_size)).sum())


def plan_epoch(
    buckets: Int[np.ndarray, " examples"], groups: Sequence[int], batch_size: int, seed: int, epoch: int | None
) -> Plan:
    """Puts every example into exactly one batch of the epoch.

    Examples are shuffled within their bucket. Those left over after the whole batches move to the next larger bucket
    of their group, where they also fit; only the last batch of a group's largest bucket is completed with filler rows.
    So the number of batches is the same in every epoch.

    Args:
      buckets: index of the smallest shape that each example fits.
      groups: group of each shape. The shapes of a group are adjacent, from small to large; an example moves only
        within its group.
      batch_size: rows in a batch.
      seed: seed of the shuffle.
      epoch: number of the epoch; `None` does not shuffle: bucket by bucket, in the examples' order.
    """
    random = None if epoch is None else np.random.default_rng((seed, epoch))
    shapes: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    left = np.zeros(0, np.int64)
    for bucket, group in enumerate(groups):
        members = np.flatnonzero(buckets == bucket)
        if random is not None:
            random.shuffle(members)
        members = np.concatenate([left, members])
        if bucket + 1 < len(groups) and groups[bucket + 1] == group:
            whole = len(members) // batch_size * batch_size
            members, left = members[:whole], members[whole:]
        else:
            fill = -len(members) % batch_size
            members, left = np.concatenate([members, np.full(fill, -1, np.int64)]), left[:0]
        shapes.append(np.full(len(members) // batch_size, bucket, np.int64))
        rows.append(members.reshape(-1, batch_size))
    plan = Plan(np.concatenate(shapes), np.concatenate(rows))
    if random is None:
        return plan
    order = random.permutation(len(plan.shapes))
    return Plan(plan.shapes[order], plan.rows[order])


def choose_lengths(lengths: Int[np.ndarray, " examples"], buckets: int, multiple: int) -> tuple[int, ...]:
    """Row lengths, at most `buckets`, that hold all examples with the fewest padding tokens.

    Candidates are the multiples of `multiple`; the choice is optimal (dynamic programming over the candidates).

    Args:
      lengths: tokens of each example; at least one example.
      buckets: largest number of lengths.
      multiple: every length is a multiple of this.

    Returns:
      Increasing lengths; the last holds the longest example.

    >>> choose_lengths(np.array([3, 3, 3, 30]), buckets=2, multiple=4)
    (4, 32)
    >>> choose_lengths(np.array([3, 3, 3, 30]), buckets=1, multiple=4)
    (32,)
    """
    if len(lengths) == 0:
        raise ValueError("choose_lengths: expected at least one example, got none")
    candidates, counts = np.unique(-(-np.asarray(lengths) // multiple) * multiple, return_counts=True)
    size = len(candidates)
    below = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: tokens, padding included, of all examples up to candidate j if j is the largest length so far.
    cost = candidates * below[1:]
    steps: list[np.ndarray] = []
    for _ in range(min(buckets, size) - 1):
        # table[i, j]: the lengths so far end at i < j, and j is added.
        table = cost[:, None] + candidates[None, :] * (below[1:][None, :] - below[1:][:, None])
        table = np.where(np.arange(size)[:, None] < np.arange(size)[None, :], table, np.iinfo(np.int64).max)
        table = np.vstack([table, cost])  # last row: no length is added
        steps.append(table.argmin(axis=0))
        cost = table.min(axis=0)
    chosen = [size - 1]
    for previous in reversed(steps):
        before = int(previous[chosen[-1]])
        if before < size:
            chosen.append(before)
    return tuple(int(candidates[index]) for index in reversed(chosen))


def count_sizes(sizes: Int[np.ndarray, "examples 2"]) -> list[tuple[int, int, int]]:
    """The sizes of examples in short: all that shapes are chosen by.

    Args:
      sizes: tokens and scored tokens of each example.

    Returns:
      By number of tokens: that number, how many examples have it, and the most scored tokens among them.

    >>> count_sizes(np.array([[7, 2], [5, 3], [7, 4]]))
    [(5, 1, 3), (7, 2, 4)]
    """
    lengths, place, counts = np.unique(sizes[:, 0], return_inverse=True, return_counts=True)
    most = np.zeros(len(lengths), np.int64)
    np.maximum.at(most, place, sizes[:, 1])
    return list(zip(lengths.tolist(), counts.tolist(), most.tolist(), strict=True))


def spread_sizes(counted: Sequence[tuple[int, int, int]]) -> Int[np.ndarray, "examples 2"]:
    """Sizes of examples that have the given `count_sizes`, and so the same shapes.

    >>> spread_sizes([(5, 1, 3), (7, 2, 4)]).tolist()
    [[5, 3], [7, 4], [7, 4]]
    """
    lengths, counts, most = np.array(counted, np.int64).reshape(-1, 3).T
    return np.repeat(np.stack([lengths, most], axis=1), counts, axis=0)
