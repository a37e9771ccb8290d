"""What the steps of a task read: its own rows, mixed with those of the memory and with general ones."""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import numpy as np

from jaxcl.data.mix import Interleaved, Mixed, WithGeneral, general_share
from jaxcl.data.pipeline import Pipeline, Stream
from jaxcl.data.teacher_store import TeacherStore
from jaxcl.errors import UserError
from jaxcl.run.components import Components
from jaxcl.run.folder import RunFolder
from jaxcl.run.remembering import Kept, memory_pipeline
from jaxcl.run.trunk import starts_anew
from jaxcl.training.config import task_steps
from jaxcl.training.schedule import Clock, learning_rate
from jaxcl.training.stored import Collate


def task_stream(parts: Components, folder: RunFolder, kept: Kept, index: int, *, stored: bool) -> Stream:
    """The batches of a task.

    Args:
      parts: the run's parts.
      folder: the run folder, which holds what is stored with remembered rows.
      kept: what is remembered of the tasks.
      index: the task.
      stored: whether the method has stored anything with remembered rows.

    Raises:
      UserError: what was stored with the rows of a task is gone.
    """
    settings = parts.config.data.general
    own = parts.training_pipeline(index)
    if settings is None:
        return _with_memory(parts, folder, kept, index, own, 0, stored)
    general = parts.pipeline([parts.general_rows(index)], origin="general")
    share = general_share(settings.share, settings.by, own, general)
    return WithGeneral(_with_memory(parts, folder, kept, index, own, share, stored), general, share)


def total_steps(parts: Components, index: int, stream: Stream | None = None) -> int:
    """Optimizer steps of a task; for joint training, those of all tasks together.

    Args:
      parts: the run's parts.
      index: the task.
      stream: its batches; without, what a memory or general rows add is not counted.
    """
    training, count, joint = parts.config.training, len(parts.tasks), parts.method.joint
    if training.steps is not None:
        steps = [task_steps(training, task, count, 1) for task in range(count)]
        return sum(steps) if joint else steps[index]
    stream = stream or parts.training_pipeline(index)
    if not joint:
        return stream.steps_for(task_steps(training, index, count, stream.own_steps_per_epoch))
    epochs = [parts.pipeline([rows]).steps_per_epoch for rows in parts.learned_rows.values()]
    return stream.steps_for(sum(task_steps(training, task, count, steps) for task, steps in enumerate(epochs)))


def _with_memory(
    parts: Components,
    folder: RunFolder,
    kept: Kept,
    index: int,
    pipeline: Pipeline,
    general: Fraction | int,
    stored: bool,
) -> Stream:
    """A task's batches, mixed with those of the memory if there is one; a share of all will be general ones."""
    replay = parts.method.replay
    if parts.method.joint:
        return pipeline
    earlier = [task for task in kept.memory.tasks if task.task < index and task.kept]
    if replay is None or not earlier:
        return pipeline
    opened = {task.task: _open_store(parts, folder, kept, task.task) for task in earlier}
    stores = {task: store for task, store in opened.items() if store is not None}
    lost = [task.name for task in earlier if task.task not in stores]
    if lost and (stores or stored):
        raise UserError(
            f"{folder.teacher}: what is stored with the remembered rows of task {lost[0]} is missing; restore "
            "it, or start a new run in another output"
        )
    collate = Collate(parts.method, parts.trainer.target.params, parts.trainer.target.method_state) if stores else None
    tasks = [task.task for task in earlier]
    memory = memory_pipeline(parts, kept, tasks, stores=stores or None, collate=collate)
    if replay.mode == "mix":
        return Mixed(pipeline, memory)
    # With a fixed number of steps, the first memory step comes no later than the last one.
    training = parts.config.training
    batches = task_steps(training, index, len(parts.tasks), pipeline.steps_per_epoch)
    latest = batches if training.steps is None else math.floor(batches * (1 - general)) - 1
    mixture = Interleaved(pipeline, memory, every=replay.every, latest=latest)
    if replay.spacing == "steps":
        return mixture
    total = total_steps(parts, index, mixture)
    own = total if training.steps is None else math.ceil(total * (1 - general))
    clock = Clock.start(parts.config.optimizer, total, first=starts_anew(parts, index))
    # General batches lie evenly between the others.
    steps = np.arange(own) * total // own
    rates = jax.vmap(lambda step: learning_rate(parts.config.optimizer, clock._replace(step=step)))(steps)
    return mixture.spaced(np.asarray(rates).tolist())


def _open_store(parts: Components, folder: RunFolder, kept: Kept, index: int) -> TeacherStore | None:
    paths = folder.stores(index)
    return TeacherStore.open(paths, parts.about(kept.task(index))) if paths else None
