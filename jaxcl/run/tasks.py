"""A task as methods see it: shared by runs and measurements without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax

from jaxcl.models.trainable import Params
from jaxcl.run.components import Components, ProcessShare
from jaxcl.run.remembering import Kept, memory_pipeline
from jaxcl.training.config import micro_batch_size
from jaxcl.training.keys import run_key
from jaxcl.training.loops import Loops
from jaxcl.training.task import RunningTask

Stage = Literal["before", "after"]


def running_task(
    parts: Components,
    kept: Kept,
    index: int,
    *,
    stage: Stage,
    params_before: Callable[[], Params],
    loops: Loops | None = None,
) -> RunningTask:
    """The task as the method sees it before or after training on it, in micro-batches.

    Args:
      parts: the parts of the run.
      kept: what is remembered so far.
      index: which task.
      stage: `before` for `Method.prepare`, `after` for `Method.consolidate`.
      params_before: reads the params from before the task.
      loops: those of the run, which may be stopped; `None`: they run through.
    """
    size = micro_batch_size(parts.config.training, parts.layout.batch_ways, jax.process_count())
    sources = list(parts.all_train_rows.values()) if parts.method.joint else [parts.train_rows(index)]
    return RunningTask(
        index=index,
        name=parts.phase_name(index),
        count=parts.phases,
        key=jax.random.fold_in(run_key(parts.config.seed, "tasks"), 2 * index + (stage == "after")),
        seed=parts.config.seed + index,
        pipeline=ProcessShare(parts.pipeline(sources, batch_size=size)),
        memory=ProcessShare(memory_pipeline(parts, kept, [index], batch_size=size)) if index in kept.tables else None,
        params_before=params_before,
        compiler=parts.trainer.compile,
        loops=loops,
    )
