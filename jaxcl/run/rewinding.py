"""What a task goes on with from a checkpoint, after too many of its steps were not finite, and what that costs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcl.data.pipeline import Stream
from jaxcl.errors import UserError
from jaxcl.run.note import Note, note_of
from jaxcl.training.checkpoint import Saved
from jaxcl.training.config import TrainingConfig
from jaxcl.training.privacy import PrivacyConfig, spent
from jaxcl.training.watch import Watch


def watch_of(config: TrainingConfig, total: int, noted: Mapping[str, Any] | None) -> Watch:
    """The watch over a task.

    Args:
      config: the training section.
      total: steps of the task: if all are skipped, the task has learned nothing, however few they are.
      noted: `Watch.plain` of the checkpoint that the task goes on from; `None`: it begins.
    """
    limit = max(1, min(config.max_skipped, total))
    return Watch(limit, config.spike_window, config.spike_deviations, **copy.deepcopy(dict(noted or {})))


def noted_watch(note: Note) -> dict[str, Any] | None:
    """What a checkpoint's note says of the watch over its task, as `watch_of` takes it."""
    return None if note.watch is None else note.watch.model_dump()


def may_go_back(config: TrainingConfig, watch: Watch) -> bool:
    """Whether the task may go back to a checkpoint once more."""
    return config.max_skipped > 0 and len(watch.left) < config.max_rewinds


def check_goes_back(saved: Saved, index: int, error: UserError) -> None:
    """Checks that a task may go on from a checkpoint: one within it, or right before it.

    Args:
      saved: the latest whole checkpoint.
      index: the task.
      error: why the task goes back.

    Raises:
      UserError: the checkpoint lies within an earlier task; started again, the run goes on from there.
    """
    note = note_of(saved)
    if (note.task, note.phase) not in ((index, "training"), (index - 1, "learned")):
        raise UserError(
            f"{error}; the last whole checkpoint is {saved.number}, of an earlier task: start the run again"
        )


def noted_after(watch: Watch, saved: Saved, *, step: int, left: int) -> dict[str, Any]:
    """What a task that goes back is counted on from: the counts of the checkpoint, and that it went back.

    Args:
      watch: of the task, which stopped.
      saved: the checkpoint: one within the task, or the one before it.
      step: the task's step there.
      left: the task's step at which it stopped.
    """
    noted = noted_watch(note_of(saved)) or {}
    return {**noted, "streak": 0, "left": [*watch.left, [step, left]]}


def order_seed(seed: int, rewinds: int) -> int:
    """The seed of the order of a task's data, and of its masking, after `rewinds` returns to a checkpoint.

    >>> order_seed(7, 0), order_seed(7, 1) != order_seed(7, 2)
    (7, True)
    """
    return int(np.random.SeedSequence((seed, rewinds)).generate_state(1)[0]) if rewinds else seed


def spent_on(privacy: PrivacyConfig, stream: Stream, total: int, watch: Watch) -> dict[str, float]:
    """What training on a task reveals (see `spent`), with what was skipped and what was left behind.

    Args:
      privacy: the privacy section.
      stream: the task's batches. General rows are public; the steps on them tell nothing about the task's.
      total: steps of the task.
      watch: of the task.
    """
    steps = stream.own_steps_in(total)
    steps += sum(stream.own_steps_in(left) - stream.own_steps_in(step) for step, left in watch.left)
    return spent(privacy, steps=steps, steps_per_epoch=stream.own_steps_per_epoch, rewinds=len(watch.left))
