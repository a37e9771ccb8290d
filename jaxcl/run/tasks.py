"""A task as methods see it, and its memory: shared by runs and measurements without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from jaxcl.data.memory import Memory, MemoryPipeline, TaskMemory
from jaxcl.data.rows import EncodedRows
from jaxcl.errors import UserError
from jaxcl.models.trainable import Params
from jaxcl.run.components import Components, ProcessShare
from jaxcl.training.config import micro_batch_size
from jaxcl.training.keys import run_key
from jaxcl.training.task import RunningTask

Stage = Literal["before", "after"]


def remember(parts: Components, memory: Memory, index: int) -> Memory:
    """The memory with what the method keeps of one more task; unchanged if it keeps nothing."""
    replay = parts.method.replay
    if replay is None or parts.method.joint:
        return memory
    return memory.with_task(
        index,
        parts.phase_name(index),
        count=len(parts.train_rows(index)),
        fraction=replay.fraction,
        minimum=replay.minimum,
        rows=parts.train_prints[index],
    )


def remembered_rows(parts: Components, task: TaskMemory) -> EncodedRows:
    """The rows that a task's memory refers to: its training examples, or samples written by the model.

    Raises:
      UserError: the training examples are not those that the memory was drawn from.
    """
    if not task.written:
        if task.rows not in ("", parts.train_prints[task.task]):
            raise UserError(
                f"task {task.name}: its memory was drawn from other training rows than are now in "
                f"{parts.tasks[task.task].where.get('train', 'its source')}: the data has changed"
            )
        return parts.train_rows(task.task)
    return parts.encode_written(task.written, task.task, task.name)


def memory_pipeline(
    parts: Components, memory: Memory, tasks: Sequence[int], *, batch_size: int | None = None, **options: Any
) -> MemoryPipeline:
    """Batches of the remembered rows of some tasks; the default size is the run's. See `MemoryPipeline`."""
    return MemoryPipeline(
        memory,
        {one.task: remembered_rows(parts, one) for one in memory.tasks if one.task in tasks},
        parts.config.data,
        batch_size=batch_size or parts.config.training.batch_size,
        shapes=parts.shapes,
        tasks=tasks,
        **options,
    )


def running_task(
    parts: Components, memory: Memory, index: int, *, stage: Stage, params_before: Callable[[], Params]
) -> RunningTask:
    """The task as the method sees it before or after training on it, in micro-batches.

    Args:
      parts: the parts of the run.
      memory: the memory so far.
      index: which task.
      stage: `before` for `Method.prepare`, `after` for `Method.consolidate`.
      params_before: reads the params from before the task.
    """
    size = micro_batch_size(parts.config.training, parts.layout.batch_ways, jax.process_count())
    remembered = any(task.task == index and task.examples for task in memory.tasks)
    sources = list(parts.all_train_rows.values()) if parts.method.joint else [parts.train_rows(index)]
    return RunningTask(
        index=index,
        name=parts.phase_name(index),
        count=parts.phases,
        key=jax.random.fold_in(run_key(parts.config.seed, "tasks"), 2 * index + (stage == "after")),
        seed=parts.config.seed + index,
        pipeline=ProcessShare(parts.pipeline(sources, batch_size=size)),
        memory=ProcessShare(memory_pipeline(parts, memory, [index], batch_size=size)) if remembered else None,
        params_before=params_before,
        compiler=parts.trainer.compile,
    )
