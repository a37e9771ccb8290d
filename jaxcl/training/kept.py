"""Which checkpoints of a run are kept, and the names of those that are needed later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

START_MARK = "before the first task"
"""Mark of the checkpoint before the first task."""


def mark_after(task: int) -> str:
    """Mark of the checkpoint after a task."""
    return f"after task {task}"


_DECAY = "before the decay of task "


def mark_before_decay(task: int) -> str:
    """Mark of the checkpoint within a task from which the next task goes on."""
    return f"{_DECAY}{task}"


class Kept:
    """An Orbax preservation policy that keeps the latest checkpoints and the latest marked ones.

    A checkpoint before a decay is kept with that after the same task, and as long as it is the latest of its kind. Of
    the latest ones, each within a task keeps that from before the task: a run that goes on from it may need both.
    """

    def __init__(self, latest: int, marked: int | None) -> None:
        self.latest = latest
        self.marked = marked
        self.marks: dict[int, str] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One answer per checkpoint, oldest first."""
        numbers = [checkpoint.step for checkpoint in checkpoints]
        before = [number for number in numbers if self.marks.get(number, "").startswith(_DECAY)]
        marked = [number for number in numbers if number in self.marks and number not in before]
        latest = numbers[-self.latest :]
        begun = [[one for one in marked if one < number][-1:] for number in latest if number not in marked]
        marked = marked if self.marked is None else marked[-self.marked :]
        marked = [*marked, *(number for found in begun for number in found)]
        needed = {mark_after(int(self.marks[number].removeprefix(_DECAY))): number for number in before}
        ends = {self.marks[number] for number in marked}
        kept = {*latest, *marked, *before[-1:]}
        kept |= {number for mark, number in needed.items() if mark in ends}
        return [number in kept for number in numbers]
