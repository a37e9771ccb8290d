"""The stream of a task's batches with batches from the memory in between."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from jaxcl.data.pipeline import CheckpointableIterator, Pipeline, iterate

Mode = Literal["interleave", "mix"]


class Mixture:
    """A task's batches and memory batches in a fixed, repeating order.

    Attributes:
      task: the task's pipeline.
      memory: the memory's pipeline.
      order: one period of the order: True where a memory batch stands.
    """

    def __init__(self, task: Pipeline, memory: Pipeline, *, mode: Mode = "interleave", every: int = 0) -> None:
        """Lays down the order.

        Args:
          task: the task's pipeline.
          memory: the memory's pipeline.
          mode: `interleave`: a memory batch after every `every` task batches; `mix`: after every task batch.
          every: see `mode`; 0 spreads one pass over the memory evenly over each epoch of the task, however large
            either is.
        """
        if mode not in ("interleave", "mix"):
            raise ValueError(f"mode: expected interleave or mix, got {mode!r}")
        if every < 0:
            raise ValueError(f"every: expected 0 or more, got {every}")
        self.task = task
        self.memory = memory
        self.prefetch = task.prefetch
        self.threads = task.threads
        if mode == "mix":
            steps, memories = 1, 1
        elif every:
            steps, memories = every, 1
        else:
            steps, memories = task.steps_per_epoch, memory.steps_per_epoch
        # Memory batch j stands right after task batch ceil(j * steps / memories): the last ends the period.
        after = -(-np.arange(1, memories + 1) * steps // memories)
        self.order = np.zeros(steps + memories, bool)
        self.order[after + np.arange(memories)] = True
        self._before = np.cumsum(self.order) - self.order

    @property
    def steps_per_epoch(self) -> int:
        """Batches, memory batches included, in one epoch of the task."""
        return self.steps_for(self.task.steps_per_epoch)

    def steps_for(self, task_steps: int) -> int:
        """Batches, memory batches included, up to where `task_steps` task batches and what follows them are through."""
        memories = int(self.order.sum())
        periods, rest = divmod(task_steps, len(self.order) - memories)
        starts = np.flatnonzero(~self.order)
        # Up to the task batch number `rest` of a further period, and the memory batches right behind the one before.
        return periods * len(self.order) + (int(starts[rest]) if rest else 0)

    def batch_at(self, step: int, *, seed: int, process_index: int = 0, process_count: int = 1) -> dict[str, Any]:
        """The batch of a step, the rows of one process: a pure function of its arguments."""
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
        """Steps of an epoch, memory batches among them, and the counts of both pipelines."""
        return {
            "steps_per_epoch": self.steps_per_epoch,
            "memory_steps_per_epoch": self.steps_per_epoch - self.task.steps_per_epoch,
            "task": self.task.describe(),
            "memory": self.memory.describe(),
        }
