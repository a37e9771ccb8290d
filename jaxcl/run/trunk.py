"""Where training goes on when schedules decay at the end of every task: before the decay.

The decayed model ends a task: it is evaluated, exported and what methods see. The next task starts from the trunk, the
params and moments that the task had before its decay, which a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxcl.errors import UserError
from jaxcl.run.components import Components
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.kept import mark_before_decay
from jaxcl.training.schedule import phases, sized_in_steps
from jaxcl.training.state import TrainState
from jaxcl.training.task import RunningTask


def starts_anew(parts: Components, index: int) -> bool:
    """Whether the model that learns a task has learned none before."""
    return index == 0 or parts.method.individual


def check_phases(parts: Components, start: int, steps: Callable[[int], int]) -> None:
    """Checks that the phases of the schedule, and an average of `sfa`, fit into every task from `start` on.

    Args:
      parts: the parts of the run.
      start: index of the first task that is still to be learned.
      steps: returns the optimizer steps of a task, at least; only called if they matter.

    Raises:
      UserError: they do not fit; names the task.
    """
    optimizer = parts.config.optimizer
    sfa = optimizer.average == "sfa"
    for index in range(start, parts.phases if sfa or sized_in_steps(optimizer) else start):
        try:
            total = steps(index)
            phases(optimizer, total, first=starts_anew(parts, index))
            if sfa and total < optimizer.average_every:
                every = optimizer.average_every
                raise UserError(f"optimizer.average_every: {every} steps are more than the task's {total}")
        except UserError as error:
            raise UserError(f"task {parts.phase_name(index)}: {error}", exit_code=2) from None


def back_to_trunk(
    parts: Components, checkpoints: Checkpoints, state: TrainState, task: RunningTask, *, consolidated: Any
) -> TrainState:
    """The state with params, moments and low bits as they were before the decay of the task before.

    Args:
      parts: the parts of the run.
      checkpoints: those of the run.
      state: the state after the task before, with the method's state for the next; params and moments are deleted.
      task: the task before, as methods see it after training.
      consolidated: the method's state after the task before. `Method.final_params` is applied to the trunk, too.

    Raises:
      UserError: the checkpoint is missing or cannot be read.
    """
    mark = mark_before_decay(task.index)
    saved = checkpoints.find(mark)
    if saved is None:
        raise UserError(f"checkpoints {checkpoints.folder}: the one {mark} is missing; the next task starts from it")
    # The old arrays are deleted before the others are read, so that memory never holds both.
    jax.tree.map(lambda leaf: leaf.delete(), (state.params, state.opt_state, state.low_bits))
    restored: dict[str, Any] = checkpoints.params_and_moments(parts.trainer.target, saved)
    state = state.replace(**restored)
    return parts.trainer.with_params(state, parts.method.final_params(state.params, consolidated, task))
