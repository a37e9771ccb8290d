"""The continual-learning matrix and the numbers derived from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class ContinualMatrix:
    """Scores of every task after every task: `scores[t, i]` on task `i` after learning task `t`.

    `R[t, i]` below is `scores[t, i]`, `T` the number of rows so far; a run that has not finished is judged as if its
    last row were the end. A score that was not measured is NaN, and so is every number that would need it. Signs are
    such that for all derived numbers but `overall_performance` the metric's direction does not matter: transfer is
    positive and forgetting negative where the model got better, also for perplexity.

    >>> matrix = ContinualMatrix.empty(2, [True, True])
    >>> for row, task, score in [(0, 0, 80.0), (1, 0, 50.0), (1, 1, 90.0)]:
    ...     matrix = matrix.record(row, task, score)
    >>> matrix.overall_performance(), matrix.backward_transfer()
    (70.0, -30.0)

    Attributes:
      scores: `[rows, tasks]` float64.
      initial: `[tasks]`, before any training.
      higher_is_better: for each task.
      joint: all tasks were learned at once: one row, in which every task counts as learned.
    """

    scores: Float[np.ndarray, "rows tasks"]
    initial: Float[np.ndarray, " tasks"]
    higher_is_better: tuple[bool, ...]
    joint: bool = False

    @classmethod
    def empty(cls, num_tasks: int, higher_is_better: Sequence[bool], *, joint: bool = False) -> ContinualMatrix:
        """A matrix without rows.

        Args:
          num_tasks: number of tasks.
          higher_is_better: direction of each task's metric.
          joint: all tasks are learned at once.
        """
        if len(higher_is_better) != num_tasks:
            raise ValueError(f"higher_is_better: expected {num_tasks} values, got {len(higher_is_better)}")
        return cls(np.zeros((0, num_tasks)), np.full(num_tasks, np.nan), tuple(higher_is_better), joint)

    @classmethod
    def from_lists(
        cls,
        rows: Sequence[Sequence[float | None]],
        initial: Sequence[float | None] | None,
        higher_is_better: Sequence[bool],
        *,
        joint: bool = False,
    ) -> ContinualMatrix:
        """A matrix from lists; `None` is a score that was not measured, and short rows are filled up with it.

        Args:
          rows: scores on the tasks, a row per task learned.
          initial: scores before any training.
          higher_is_better: direction of each task's metric.
          joint: all tasks were learned at once.
        """
        num_tasks = len(higher_is_better)
        too_long = [len(row) for row in (*rows, initial or ()) if len(row) > num_tasks]
        if too_long or len(rows) > num_tasks:
            raise ValueError(f"rows: expected at most {num_tasks} of at most {num_tasks} scores, got more")
        scores = np.full((len(rows), num_tasks), np.nan)
        for index, row in enumerate(rows):
            scores[index, : len(row)] = [np.nan if score is None else score for score in row]
        matrix = cls.empty(num_tasks, higher_is_better, joint=joint)
        for task, score in enumerate(initial or ()):
            matrix.initial[task] = np.nan if score is None else score
        return dataclasses.replace(matrix, scores=scores)

    @property
    def num_tasks(self) -> int:
        """Number of tasks, learned or not."""
        return self.scores.shape[1]

    @property
    def learned(self) -> int:
        """Number of tasks learned so far."""
        return self.num_tasks if self.joint and len(self.scores) else len(self.scores)

    def record(self, row: int, task: int, score: float) -> ContinualMatrix:
        """The matrix with one more score.

        Args:
          row: index of the task learned last, -1 before any training. At most one row beyond the present ones.
          task: index of the task scored.
          score: the score.

        Raises:
          ValueError: a row or task out of range.
        """
        if not (-1 <= row <= len(self.scores) and row < (1 if self.joint else self.num_tasks)):
            raise ValueError(f"row: expected -1 to {len(self.scores)} within the tasks, got {row}")
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"task: expected 0 to {self.num_tasks - 1}, got {task}")
        if row == -1:
            initial = self.initial.copy()
            initial[task] = score
            return dataclasses.replace(self, initial=initial)
        scores = self.scores.copy()
        if row == len(scores):
            scores = np.concatenate([scores, np.full((1, self.num_tasks), np.nan)])
        scores[row, task] = score
        return dataclasses.replace(self, scores=scores)

    def carry(self) -> ContinualMatrix:
        """The matrix with one more row: the scores of the tasks learned so far once more, the others not measured.

        For models that do not change any more once their task has been learned.

        >>> ContinualMatrix.empty(2, [True, True]).record(0, 0, 80.0).carry().rows()
        [[80.0, None], [80.0, None]]
        """
        row = np.where(np.arange(self.num_tasks) < self.learned, self.scores[-1], np.nan)
        return dataclasses.replace(self, scores=np.concatenate([self.scores, row[None]]))

    def up_to(self, rows: int) -> ContinualMatrix:
        """The matrix with at least this many rows; new ones are empty."""
        more = max(rows - len(self.scores), 0)
        return dataclasses.replace(self, scores=np.pad(self.scores, ((0, more), (0, 0)), constant_values=np.nan))

    def rows(self) -> list[list[float | None]]:
        """The scores as lists, `None` where not measured, for JSON."""
        return [_as_list(row) for row in self.scores]

    def initial_row(self) -> list[float | None] | None:
        """The scores before any training as a list, `None` if there are none."""
        return None if np.isnan(self.initial).all() else _as_list(self.initial)

    def overall_performance(self) -> float:
        """OP: mean of the last row over the tasks learned so far (`1/T sum_i R[T, i]`), in the metric's unit.

        NaN if some tasks' metrics are better when larger and others when smaller: their mean says nothing.
        """
        if not self.learned or len(set(self.higher_is_better[: self.learned])) > 1:
            return float("nan")
        return float(self.scores[-1, : self.learned].mean())

    def backward_transfer(self) -> float:
        """BWT: mean over the `T - 1` earlier tasks of `R[T, i] - R[i, i]`; negative where something was forgotten.

        The script published with SEEKR divides by `T` instead. NaN with fewer than two rows.
        """
        earlier = len(self.scores) - 1
        if earlier < 1:
            return float("nan")
        change = self.scores[-1, :earlier] - np.diagonal(self.scores)[:earlier]
        return float((change * self._sign(earlier)).mean())

    def forgetting_rate(self) -> float:
        """DAS's forgetting rate: mean over earlier tasks of the score right after learning minus that at the end."""
        rate = -self.backward_transfer()
        return rate + 0.0  # never -0.0

    def forgetting(self) -> float:
        """Forgetting: mean over earlier tasks of the best score between learning and the last row, minus the last.

        `1/(T-1) sum_i (max_{i <= l < T} R[l, i] - R[T, i])` (Chaudhry et al., 2018, where `l` starts at the first
        task; scores before a task was learned are left out here, so that evaluating future tasks changes nothing).
        """
        earlier = len(self.scores) - 1
        if earlier < 1:
            return float("nan")
        signed = self.scores[:, :earlier] * self._sign(earlier)
        losses = [signed[task:-1, task].max() - signed[-1, task] for task in range(earlier)]
        return float(np.mean(losses))

    def forward_transfer(self) -> float:
        """FWT: mean over the later tasks of `R[i-1, i] - initial[i]` (Lopez-Paz and Ranzato, 2017).

        How much learning the earlier tasks helped on the next one before it was seen. Needs the initial scores and
        the scores on the next task.
        """
        later = len(self.scores)
        if later < 2:
            return float("nan")
        steps = np.arange(1, later)
        gain = self.scores[steps - 1, steps] - self.initial[steps]
        return float((gain * self._sign(later)[1:]).mean())

    def gain(self) -> float:
        """Mean over the tasks learned of `R[T, i] - initial[i]`: what all the training brought in the end."""
        if not self.learned:
            return float("nan")
        change = self.scores[-1, : self.learned] - self.initial[: self.learned]
        return float((change * self._sign(self.learned)).mean())

    def intransigence(self, reference: Sequence[float]) -> float:
        """Mean over tasks of the reference's score minus `R[i, i]`: what the method could not learn.

        Args:
          reference: scores of a model trained on all tasks at once, `[tasks]` (Chaudhry et al., 2018).
        """
        learned = len(self.scores)
        if len(reference) != self.num_tasks:
            raise ValueError(f"reference: expected {self.num_tasks} scores, got {len(reference)}")
        if not learned or self.joint:
            return float("nan")
        gap = np.asarray(reference, dtype=np.float64)[:learned] - np.diagonal(self.scores)[:learned]
        return float((gap * self._sign(learned)).mean())

    def _sign(self, count: int) -> Float[np.ndarray, " tasks"]:
        return np.where(self.higher_is_better[:count], 1.0, -1.0)


def _as_list(row: Float[np.ndarray, " tasks"]) -> list[float | None]:
    return [None if np.isnan(score) else float(score) for score in row]
