"""Replay memory: which examples of earlier tasks are kept, and their batches."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from pydantic import Field, ValidationError, model_validator

from jaxcl.data.files import parse_json, read_text, write_json
from jaxcl.data.fingerprint import rows_print
from jaxcl.data.pipeline import Collate, Pipeline
from jaxcl.data.plan import Shape
from jaxcl.data.rows import EncodedRows, Noise, RowFields
from jaxcl.data.spec import DataConfig
from jaxcl.data.teacher_store import TeacherStore
from jaxcl.errors import UserError
from jaxcl.schema import Schema

VERSION = 1


def draw_examples(count: int, fraction: float, minimum: int, *, seed: int, task: int) -> list[int]:
    """The examples of a task that are kept: a random draw without replacement that depends on seed and task only.

    Args:
      count: number of examples of the task.
      fraction: share that is kept.
      minimum: smallest number kept; all, if the task has fewer.
      seed: seed of the draw.
      task: index of the task.

    Returns:
      Example numbers in increasing order.

    >>> len(draw_examples(250, 0.01, 1, seed=0, task=0)), len(draw_examples(250, 0.0, 1, seed=0, task=0))
    (2, 1)
    """
    kept = draw_count(count, fraction, minimum)
    return sorted(np.random.default_rng((seed, task)).choice(count, kept, replace=False).tolist())


def draw_count(count: int, fraction: float, minimum: int) -> int:
    """How many of `count` examples are kept, see `draw_examples`; a fraction above 0 keeps at least one.

    >>> draw_count(250, 0.01, 1), draw_count(2, 0.0, 8), draw_count(40, 0.01, 0)
    (2, 2, 1)
    """
    return min(count, max(minimum, round(fraction * count), int(fraction > 0)))


class TaskMemory(Schema):
    """The kept examples of one task."""

    task: int = Field(ge=0, description="index of the task")
    name: str = Field(description="name of the task")
    count: int = Field(ge=0, description="number of examples of the task")
    examples: tuple[int, ...] = Field(description="numbers of the kept examples, increasing")
    written: tuple[dict[str, str], ...] = Field(
        (), description="prompts and answers written by the model, remembered instead of examples"
    )
    dropped: dict[str, int] = Field({}, description="number of written samples that are not remembered, by reason")
    rows: str = Field("", description="fingerprint of the rows that the numbers refer to; empty: unknown")

    @model_validator(mode="after")
    def _examples_exist(self) -> TaskMemory:
        if list(self.examples) != sorted({one for one in self.examples if 0 <= one < self.count}):
            raise ValueError(f"task {self.name}: examples must be increasing numbers from 0 to {self.count - 1}")
        return self


class Memory(Schema):
    """The kept examples of all tasks so far, immutable.

    >>> memory = Memory(seed=3).with_task(0, "first", count=300, fraction=0.01, minimum=1)
    >>> len(memory.tasks[0].examples)
    3
    """

    version: int = Field(VERSION, description="version of the file format")
    seed: int = Field(ge=0, description="seed of the draws")
    tasks: tuple[TaskMemory, ...] = Field((), description="kept examples by task")

    def with_task(self, task: int, name: str, *, count: int, fraction: float, minimum: int, rows: str = "") -> Memory:
        """A copy with the examples drawn from one more task; a task already in the memory is drawn again.

        Args:
          task: number of the task.
          name: name of the task.
          count: examples there are to choose from.
          fraction: share of them to keep.
          minimum: smallest number to keep.
          rows: fingerprint of the examples there are (`ordered` of `rows_print`).
        """
        examples = draw_examples(count, fraction, minimum, seed=self.seed, task=task)
        return self._with(TaskMemory(task=task, name=name, count=count, examples=tuple(examples), rows=rows))

    def with_written(
        self, task: int, name: str, rows: Sequence[Mapping[str, str]], dropped: Mapping[str, int]
    ) -> Memory:
        """A copy with the samples that the model wrote for one more task.

        Args:
          task: number of the task.
          name: name of the task.
          rows: the samples, with `prompt` and `answer`.
          dropped: how many were dropped, by reason.
        """
        texts = tuple(dict(row) for row in rows)
        numbers = tuple(range(len(texts)))
        new = TaskMemory(
            task=task,
            name=name,
            count=len(texts),
            examples=numbers,
            written=texts,
            dropped=dict(dropped),
            rows=rows_print(texts)["ordered"],
        )
        return self._with(new)

    def _with(self, new: TaskMemory) -> Memory:
        kept = tuple(one for one in self.tasks if one.task != new.task)
        return self.model_copy(update={"tasks": tuple(sorted((*kept, new), key=lambda one: one.task))})

    def save(self, path: str | Path) -> None:
        """Writes the memory as JSON, atomically.

        Raises:
          UserError: the file cannot be written.
        """
        write_json(path, self.model_dump())

    @classmethod
    def load(cls, path: str | Path) -> Memory:
        """Reads a memory.

        Raises:
          UserError: the file is missing, is not a memory, or has another version.
        """
        content = parse_json(read_text(path), path)
        try:
            memory = cls.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{path} is not a memory file: {error.errors()[0]['msg']}") from error
        if memory.version != VERSION:
            raise UserError(f"{path} has version {memory.version}; this program reads version {VERSION}")
        return memory


class SubsetRows(EncodedRows):
    """A subset of a task's encoded examples.

    Attributes:
      rows: all examples.
      indices: numbers of the examples in the subset.
    """

    def __init__(self, rows: EncodedRows, indices: Sequence[int]) -> None:
        outside = [index for index in indices if not 0 <= index < len(rows)]
        if outside:
            raise ValueError(f"indices: expected examples of {rows.name}, 0 to {len(rows) - 1}, got {outside[0]}")
        self.rows = rows
        self.indices: Int[np.ndarray, " examples"] = np.asarray(indices, np.int64)
        self.group = rows.group
        self.name = rows.name
        self.task = rows.task

    @functools.cached_property
    def sizes(self) -> Int[np.ndarray, "examples 2"]:
        """Sizes of the kept examples."""
        return self.rows.sizes[self.indices]

    def leaves(self) -> list[EncodedRows]:
        """The sources of the whole set."""
        return self.rows.leaves()

    def number(self, index: int) -> int:
        """Number of the example in the whole set."""
        return int(self.indices[index])

    def shapes(self, others: Sequence[SubsetRows]) -> list[Shape]:
        """Shapes for all examples of the whole sets, so that a memory needs no further compiled step."""
        return self.rows.shapes([leaf for other in others for leaf in other.leaves()])

    def row(self, index: int, shape: Shape, noise: Noise) -> RowFields:
        """The row of a kept example; -1 gives a filler row."""
        return self.rows.row(self.number(index) if index >= 0 else -1, shape, noise)

    def describe(self) -> dict[str, Any]:
        """Number of kept examples, of examples they were drawn from, and of kept tokens."""
        return {"examples": len(self), "of": len(self.rows), "tokens": self.total}


class MemoryPipeline(Pipeline):
    """Batches of remembered examples of all earlier tasks, with their stored signals."""

    def __init__(
        self,
        memory: Memory,
        rows: Mapping[int, EncodedRows],
        config: DataConfig,
        *,
        batch_size: int,
        shapes: Sequence[Shape] | None = None,
        stores: Mapping[int, TeacherStore] | None = None,
        collate: Collate | None = None,
        tasks: Sequence[int] | None = None,
    ) -> None:
        """Collects the kept examples.

        Args:
          memory: which examples are kept.
          rows: encoded training examples by task, of every task of the memory (of `tasks`, if given).
          config: `prefetch` and `threads` are used.
          batch_size: rows per batch over all processes.
          shapes: shapes for prompt-answer batches; give the run's, so that the step is not compiled again.
          stores: stored signals of the kept examples, by task; none: batches have no `teacher`.
          collate: see `Pipeline`.
          tasks: use only these tasks; none: all.

        Raises:
          UserError: the memory is empty, or was drawn from a different number of examples than in `rows`.
        """
        kept = [one for one in memory.tasks if (tasks is None or one.task in tasks) and one.examples]
        for one in kept:
            if one.count != len(rows[one.task]):
                raise UserError(
                    f"the memory of task {one.name} was drawn from {one.count} examples, the task now has "
                    f"{len(rows[one.task])}: the data has changed"
                )
        super().__init__(
            [SubsetRows(rows[one.task], one.examples) for one in kept],
            batch_size,
            config,
            shapes=shapes,
            origin="memory",
            fixed_noise=memory.seed,
            lookup=None if stores is None else lambda task, example: stores[task].get(example),
            collate=collate,
        )
