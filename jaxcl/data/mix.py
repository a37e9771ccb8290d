"""A task's batches, interleaved with memory or general batches, or each paired with a memory batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from jaxcl.data.pipeline import CheckpointableIterator, Pipeline, Stream, iterate
from jaxcl.data.rows import HostBatch
from jaxcl.data.shares import Shares, exactly


class Interleaved:
    """A task's batches and memory batches in a fixed, repeating order.

    Attributes:
      task: the task's pipeline.
      memory: the memory's pipeline.
      order: one period of the order: True for a memory batch.
    """

    def __init__(self, task: Pipeline, memory: Pipeline, *, every: int = 0, latest: int | None = None) -> None:
        """Fixes the order.

        Args:
          task: the task's pipeline.
          memory: the memory's pipeline.
          every: number of task batches between memory batches; 0 spreads one pass over the memory evenly over each
            epoch of the task, whatever their sizes.
          latest: the first memory batch comes after at most this many task batches, so that a short task still
            replays.
        """
        if every < 0:
            raise ValueError(f"every: expected 0 or more, got {every}")
        self.task = task
        self.memory = memory
        self.prefetch = task.prefetch
        self.threads = task.threads
        steps, memories = (every, 1) if every else (task.steps_per_epoch, memory.steps_per_epoch)
        if latest is not None and -(-steps // memories) > latest:
            steps, memories = max(1, latest), 1
        # Memory batch j follows task batch ceil(j * steps / memories); the last one ends the period.
        after = -(-np.arange(1, memories + 1) * steps // memories)
        self.order = np.zeros(steps + memories, bool)
        self.order[after + np.arange(memories)] = True
        self._before = np.cumsum(self.order) - self.order

    def spaced(self, rates: Sequence[float]) -> Interleaved:
        """As many memory batches, spaced by the sum of learning rates between them instead of by steps.

        Args:
          rates: learning rate of each step of the task, memory batches included.

        Returns:
          The mixture for one task of `len(rates)` steps; this one if the model does not move.
        """
        moved = np.cumsum(np.asarray(rates, np.float64))
        count = len(moved) - self.own_steps_in(len(moved))
        if not count or moved[-1] <= 0:
            return self
        places = np.searchsorted(moved, moved[-1] * np.arange(1, count + 1) / count * (1 - 1e-12))
        # One batch per step: those that would coincide come one after the other, and all before the end.
        number = np.arange(count)
        places = np.minimum(np.maximum.accumulate(places - number) + number, len(moved) - count + number)
        found = copy.copy(self)
        found.order = np.zeros(len(moved), bool)
        found.order[places] = True
        found._before = np.cumsum(found.order) - found.order
        return found

    @property
    def steps_per_epoch(self) -> int:
        """Batches, memory batches included, in one epoch of the task."""
        return self.steps_for(self.task.steps_per_epoch)

    def steps_for(self, own_steps: int) -> int:
        """Batches, memory batches included, that hold `own_steps` task batches and the memory batches after them."""
        memories = int(self.order.sum())
        periods, rest = divmod(own_steps, len(self.order) - memories)
        starts = np.flatnonzero(~self.order)
        # Up to, but not including, task batch number `rest` of the next period.
        return periods * len(self.order) + (int(starts[rest]) if rest else 0)

    @property
    def own_steps_per_epoch(self) -> int:
        """Task batches in one epoch of the task."""
        return self.task.steps_per_epoch

    def own_steps_in(self, steps: int) -> int:
        """Task batches among the first `steps` batches."""
        periods, rest = divmod(steps, len(self.order))
        return steps - periods * int(self.order.sum()) - int(self.order[:rest].sum())

    def batch_at(self, step: int, *, seed: int, process_index: int = 0, process_count: int = 1) -> HostBatch:
        """One process's rows of the batch of a step; a pure function of its arguments.

        Args:
          step: number of the batch, counted over all epochs.
          seed: seed of the shuffle and the masking.
          process_index: which process asks.
          process_count: number of processes.
        """
        period, place = divmod(step, len(self.order))
        before = int(self._before[place])
        memories = int(self.order.sum())
        if self.order[place]:
            stream, number = self.memory, period * memories + before
        else:
            stream, number = self.task, period * (len(self.order) - memories) + place - before
        return stream.batch_at(number, seed=seed, process_index=process_index, process_count=process_count)

    def train(self, seed: int, process_index: int = 0, process_count: int = 1) -> CheckpointableIterator:
        """An endless iterator over the mixture; see `iterate`."""
        return iterate(self, seed, process_index, process_count)

    def describe(self) -> dict[str, Any]:
        """Steps per epoch, how many of them are memory batches, and the counts of both pipelines."""
        return {
            "steps_per_epoch": self.steps_per_epoch,
            "memory_steps_per_epoch": self.steps_per_epoch - self.task.steps_per_epoch,
            "task": self.task.describe(),
            "memory": self.memory.describe(),
        }


class Mixed:
    """A task's batches, each with a memory batch in the field `memory`.

    Attributes:
      task: the task's pipeline.
      memory: the memory's pipeline; its epochs are independent of the task's.
    """

    def __init__(self, task: Pipeline, memory: Pipeline) -> None:
        """Joins two pipelines.

        Args:
          task: the task's pipeline.
          memory: the memory's pipeline.
        """
        self.task = task
        self.memory = memory
        self.prefetch = task.prefetch
        self.threads = task.threads

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch of the task."""
        return self.task.steps_per_epoch

    @property
    def own_steps_per_epoch(self) -> int:
        """All batches of an epoch: each holds rows of the task."""
        return self.steps_per_epoch

    def steps_for(self, own_steps: int) -> int:
        """The same number: every batch holds rows of the task."""
        return own_steps

    def own_steps_in(self, steps: int) -> int:
        """The same number: every batch holds rows of the task."""
        return steps

    def batch_at(self, step: int, *, seed: int, process_index: int = 0, process_count: int = 1) -> HostBatch:
        """One process's rows of the batch of a step; a pure function of its arguments.

        Args:
          step: number of the batch, counted over all epochs.
          seed: seed of the shuffle and the masking.
          process_index: which process asks.
          process_count: number of processes.
        """
        of_task, of_memory = (
            stream.batch_at(step, seed=seed, process_index=process_index, process_count=process_count)
            for stream in (self.task, self.memory)
        )
        return {**of_task, "memory": of_memory}

    def train(self, seed: int, process_index: int = 0, process_count: int = 1) -> CheckpointableIterator:
        """An endless iterator over the batches; see `iterate`."""
        return iterate(self, seed, process_index, process_count)

    def describe(self) -> dict[str, Any]:
        """Steps per epoch, each with a memory batch, and the counts of both pipelines."""
        return {
            "steps_per_epoch": self.steps_per_epoch,
            "memory_steps_per_epoch": self.steps_per_epoch,
            "task": self.task.describe(),
            "memory": self.memory.describe(),
        }


class WithGeneral:
    """A stream of batches of a task and its memory, among which whole batches of general examples come evenly.

    Of the first n batches, `n * share` are general ones, rounded.

    Attributes:
      own: the other batches.
      general: the pipeline of general examples, which is passed through in epochs of its own.
      share: share of general batches among all.
    """

    def __init__(self, own: Stream, general: Pipeline, share: Fraction) -> None:
        """Joins them.

        Args:
          own: batches of a task, with or without a memory.
          general: the general examples.
          share: share of general batches among all; above 0 and below 1.
        """
        self.own = own
        self.general = general
        self.share = share
        self.prefetch = own.prefetch
        self.threads = own.threads
        self._turns = Shares([share, 1 - share])

    @property
    def steps_per_epoch(self) -> int:
        """Batches, general ones included, in one epoch of the task."""
        return self.steps_for(self.own_steps_per_epoch)

    @property
    def own_steps_per_epoch(self) -> int:
        """Task batches in one epoch of the task."""
        return self.own.own_steps_per_epoch

    def steps_for(self, own_steps: int) -> int:
        """Batches that hold `own_steps` task batches, what was added to them, and the general batches before them."""
        wanted = self.own.steps_for(own_steps)
        steps = wanted
        while (missing := wanted - self._turns.before(steps)[1]) > 0:
            steps += missing
        return steps

    def own_steps_in(self, steps: int) -> int:
        """Task batches among the first `steps` batches."""
        return self.own.own_steps_in(self._turns.before(steps)[1])

    def batch_at(self, step: int, *, seed: int, process_index: int = 0, process_count: int = 1) -> HostBatch:
        """One process's rows of the batch of a step; a pure function of its arguments.

        Args:
          step: number of the batch, counted over all epochs.
          seed: seed of the shuffle and the masking.
          process_index: which process asks.
          process_count: number of processes.
        """
        turn, number = self._turns.at(step)
        stream: Stream = self.own if turn else self.general
        return stream.batch_at(number, seed=seed, process_index=process_index, process_count=process_count)

    def train(self, seed: int, process_index: int = 0, process_count: int = 1) -> CheckpointableIterator:
        """An endless iterator over the batches; see `iterate`."""
        return iterate(self, seed, process_index, process_count)

    def describe(self) -> dict[str, Any]:
        """Counts of the other batches, and of the general ones under `general`."""
        general = {"step_share": round(float(self.share), 4), **self.general.describe()}
        return {**self.own.describe(), "general": general}


def general_share(share: float, by: Literal["tokens", "rows"], own: Pipeline, general: Pipeline) -> Fraction:
    """Share of general batches for which general examples have a share of all tokens or rows.

    Memory batches count as batches of the task.

    Args:
      share: of the general examples, above 0 and below 1.
      by: what it is a share of. By rows, it is the share of batches: all have the same number of rows.
      own: the task's batches.
      general: the general batches.
    """
    wanted = exactly(share)
    if by == "rows":
        return wanted
    ours, theirs = own.tokens_per_step, general.tokens_per_step
    return wanted * ours / (wanted * ours + (1 - wanted) * theirs)
