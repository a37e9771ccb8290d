"""What is watched while a task is trained: steps that changed nothing, and spikes of the loss."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

from jaxcl.errors import UserError


class NotFinite(UserError):
    """Training cannot go on: losses or gradients were not finite too often in a row, or the params are not any more.

    Attributes:
      step: the task's step at which that was found.
    """

    def __init__(self, message: str, step: int) -> None:
        """An error at a step.

        Args:
          message: one line.
          step: the step of the task.
        """
        super().__init__(message)
        self.step = step


@dataclasses.dataclass
class Watch:
    """Counts of a task so far, all read from metrics that every process has: so all of them decide alike.

    Attributes:
      limit: skipped steps in a row after which training cannot go on, at least 1.
      window: number of earlier losses, of the same kind of batch, that a loss is compared with; 0: with none.
      deviations: a loss this many standard deviations above their mean is a spike.
      skipped: steps that changed nothing, because loss or gradient was not finite.
      streak: how many of them were the last ones, without a step between that was not skipped.
      spikes: steps of the task whose loss was a spike, counted from 1. They are only recorded.
      left: for each time that the task went back to a checkpoint, its step and the step that was left.
      losses: the last losses by kind of batch, at most `window`.
    """

    limit: int = 1
    window: int = 0
    deviations: float = 0.0
    skipped: int = 0
    streak: int = 0
    spikes: list[int] = dataclasses.field(default_factory=list)
    left: list[list[int]] = dataclasses.field(default_factory=list)
    losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def add(self, step: int, kind: str, metrics: Mapping[str, float]) -> str | None:
        """Takes in a step; returns the name of what is not finite and ends the training, `None` to go on.

        Args:
          step: the step of the task, from 1.
          kind: `Batch.origin`.
          metrics: of the step.
        """
        names = sorted(metrics, key=lambda name: name != "loss")  # if the loss is not finite, it is the one to name
        bad = next((name for name in names if not math.isfinite(metrics[name])), None)
        if metrics["skipped"]:
            self.skipped += 1
            self.streak += 1
            return bad if self.streak >= self.limit else None
        self.streak = 0
        if bad is None and self.window:
            self._compare(step, kind, metrics["loss"])
        return bad

    def _compare(self, step: int, kind: str, loss: float) -> None:
        earlier = self.losses.setdefault(kind, [])
        if len(earlier) == self.window:
            mean = statistics.fmean(earlier)
            if loss > mean + self.deviations * statistics.pstdev(earlier, mean):
                self.spikes.append(step)
            del earlier[0]
        earlier.append(loss)

    def plain(self) -> dict[str, Any]:
        """The counts, by name and JSON-serialisable, for the note of a checkpoint."""
        counts = dataclasses.asdict(self)
        return {name: counts[name] for name in counts if name not in ("limit", "window", "deviations")}
