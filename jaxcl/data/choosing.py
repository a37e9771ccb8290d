"""Which examples go into a replay memory, and how many of each task: pure functions, the same in every process.

Every way to choose puts the examples of a task into an order, of which the memory keeps the beginning. When a task's
share shrinks, its memory becomes a shorter beginning of the same order, so that nothing has to be read again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int

#: A task with more different answers than this is not balanced over them.
FEW_ANSWERS = 100


def priorities(count: int, *, seed: int, task: int) -> Float[np.ndarray, " examples"]:
    """A number from 0 to 1 per example that depends on seed, task and the example's number only; smaller ones are kept.

    Args:
      count: number of examples.
      seed: seed of the run.
      task: index of the task.

    >>> bool((priorities(9, seed=3, task=1)[:4] == priorities(4, seed=3, task=1)).all())
    True
    """
    return np.random.default_rng((seed, task, 1)).random(count)


def rank_examples(
    choose: str,
    count: int,
    *,
    seed: int,
    task: int,
    answers: Sequence[Hashable] | None = None,
    losses: Float[np.ndarray, " examples"] | None = None,
) -> Int[np.ndarray, " examples"]:
    """All examples of a task, those first that the memory keeps first.

    Args:
      choose: `random` and `reservoir`: by `priorities`. `balanced`: the first examples by priority of each answer, then
        the second ones, and so on. `highest_loss`: by loss; of equal losses, the smaller number first.
      count: number of examples.
      seed: seed of the run.
      task: index of the task.
      answers: the answer of each example, for `balanced`; none: as `random`.
      losses: the loss of each example, for `highest_loss`.

    Returns:
      Numbers of the examples.

    >>> rank_examples("highest_loss", 3, seed=0, task=0, losses=np.array([1.0, 3.0, 2.0])).tolist()
    [1, 2, 0]
    """
    if choose not in ("random", "reservoir", "balanced", "highest_loss"):
        raise ValueError(f"choose: expected random, reservoir, balanced or highest_loss, got {choose}")
    if choose == "highest_loss":
        if losses is None:
            raise ValueError("losses: needed for highest_loss, got None")
        return np.argsort(-losses, kind="stable")
    drawn = priorities(count, seed=seed, task=task)
    order = np.argsort(drawn, kind="stable")
    if choose != "balanced" or answers is None:
        return order
    turn, seen = np.zeros(count, np.int64), Counter[Hashable]()
    for number in order.tolist():
        turn[number] = seen[answers[number]]
        seen[answers[number]] += 1
    return np.lexsort((drawn, turn))


def equal_shares(budget: int, totals: Sequence[int]) -> list[int]:
    """A budget divided equally over tasks, of which none gets more than it has; the first ones get what is left over.

    A task's share never grows when another task is added.

    Args:
      budget: what is divided.
      totals: how much each task has.

    >>> equal_shares(10, [2, 50, 50]), equal_shares(5, [9, 9]), equal_shares(9, [2, 3])
    ([2, 4, 4], [3, 2], [2, 3])
    """
    level, left = 0, budget
    for place, total in enumerate(sorted(totals)):
        level = min(total, left // (len(totals) - place))
        left -= level
        if level < total:
            break
    shares = [min(total, level) for total in totals]
    rest = budget - sum(shares)
    for task, total in enumerate(totals):
        if rest and total > level:
            shares[task] += 1
            rest -= 1
    return shares


def count_fitting(costs: Int[np.ndarray, " examples"], room: int) -> int:
    """How many of the first examples fit together.

    >>> count_fitting(np.array([4, 3, 5]), 8)
    2
    """
    return int(np.searchsorted(np.cumsum(costs), room, side="right"))


def reservoir_counts(
    drawn: Sequence[Float[np.ndarray, " examples"]],
    costs: Sequence[Int[np.ndarray, " examples"]],
    room: int,
    limit: float | None,
) -> tuple[list[int], float | None]:
    """How many examples of each task are among those of the smallest priorities over all tasks that fit together.

    Args:
      drawn: priorities of each task's examples, increasing: of earlier tasks, the kept ones.
      costs: their costs.
      room: the budget.
      limit: priority from which examples of earlier tasks were given up; none: all were kept.

    Returns:
      Examples per task, and the new limit.

    >>> ones = np.ones(2, int)
    >>> reservoir_counts([np.array([0.1, 0.8]), np.array([0.2, 0.3])], [ones, ones], 3, None)
    ([1, 2], 0.8)
    """
    tasks = np.repeat(np.arange(len(drawn)), [len(one) for one in drawn])
    together = np.concatenate(drawn)
    order = np.argsort(together, kind="stable")
    count = count_fitting(np.concatenate(costs)[order], room)
    if limit is not None:
        count = min(count, int((together < limit).sum()))
    if count < len(order):
        first = float(together[order[count]])
        limit = first if limit is None else min(limit, first)
    return np.bincount(tasks[order[:count]], minlength=len(drawn)).tolist(), limit
