"""Replay memory: which examples of earlier tasks are kept, and their batches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from pydantic import Field, ValidationError, model_validator

from jaxcl.data.files import parse_json, read_text, write_json
from jaxcl.data.pipeline import Collate, Pipeline
from jaxcl.data.plan import Shape
from jaxcl.data.rows import EncodedRows, Noise, RowFields
from jaxcl.data.spec import DataConfig
from jaxcl.data.teacher_store import TeacherStore
from jaxcl.errors import UserError
from jaxcl.schema import Schema

VERSION = 2  # 2: the examples themselves are kept, in files


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


class Version(Schema):
    """What is kept of a task after some task, until a later version."""

    after: int = Field(ge=0, description="index of the task after which this much is kept")
    size: int = Field(ge=0, description="how many of the task's examples are kept, the first ones")
    files: dict[str, str] = Field({}, description="hash of each file of the folder `memory` that holds them, by name")


class TaskMemory(Schema):
    """The kept examples of one task, and those that were kept before a later task took their room."""

    task: int = Field(ge=0, description="index of the task")
    name: str = Field(description="name of the task")
    count: int = Field(ge=0, description="number of examples of the task")
    examples: tuple[int, ...] = Field(
        description="numbers of the examples kept when the task was learned; the last ones are given up first"
    )
    versions: tuple[Version, ...] = Field(min_length=1, description="how many of them are kept, oldest first")
    sizes: tuple[tuple[int, int, int], ...] = Field(
        (), description="sizes of all examples, see `count_sizes`: the shapes of batches follow from them"
    )
    limit: float | None = Field(
        None, description="reservoir: priority of the first example of all tasks so far that is not kept"
    )
    synthetic: bool = Field(False, description="samples that the model wrote are remembered instead of examples")
    dropped: dict[str, int] = Field({}, description="number of written samples that are not remembered, by reason")
    rows: str = Field("", description="fingerprint of the rows that the numbers refer to; empty: unknown")

    @model_validator(mode="after")
    def _examples_exist(self) -> TaskMemory:
        if len({one for one in self.examples if 0 <= one < self.count}) < len(self.examples):
            raise ValueError(f"task {self.name}: examples must be different numbers from 0 to {self.count - 1}")
        sizes = [len(self.examples), *(one.size for one in self.versions)]
        if sizes != sorted(sizes, reverse=True):
            raise ValueError(f"task {self.name}: a version is larger than the one before it")
        return self

    @property
    def ranked(self) -> tuple[int, ...]:
        """Numbers of the examples that are kept now; the last ones are given up first."""
        return self.examples[: self.versions[-1].size]

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the examples that are kept now, increasing: the order in which they are stored."""
        return tuple(sorted(self.ranked))

    def _with_version(self, version: Version) -> TaskMemory:
        return self.model_copy(update={"versions": (*self.versions, version)})


class Memory(Schema):
    """The kept examples of all tasks so far, immutable.

    >>> memory = Memory(seed=3).with_task(0, "first", count=300, examples=[7, 299, 12])
    >>> memory.cut({0: 2}, after=1).tasks[0].kept
    (7, 299)
    """

    version: int = Field(VERSION, description="version of the file format")
    seed: int = Field(ge=0, description="seed of the draws")
    tasks: tuple[TaskMemory, ...] = Field((), description="kept examples by task")

    def with_task(self, task: int, name: str, *, count: int, examples: Sequence[int], **about: Any) -> Memory:
        """A copy with the examples chosen of one more task; a task already in the memory is replaced.

        Args:
          task: index of the task.
          name: name of the task.
          count: examples there are to choose from.
          examples: numbers of the chosen ones; the last ones are given up first.
          **about: further fields of `TaskMemory`.
        """
        versions = (Version(after=task, size=len(examples)),)
        new = TaskMemory(task=task, name=name, count=count, examples=tuple(examples), versions=versions, **about)
        kept = tuple(one for one in self.tasks if one.task != task)
        return self.model_copy(update={"tasks": tuple(sorted((*kept, new), key=lambda one: one.task))})

    def cut(self, sizes: Mapping[int, int], *, after: int) -> Memory:
        """A copy that keeps fewer examples of some tasks.

        Args:
          sizes: how many are kept, by task; the others, and those that keep as many as now, stay as they are.
          after: index of the task that takes their room.
        """

        def smaller(one: TaskMemory) -> TaskMemory:
            size = sizes.get(one.task, len(one.ranked))
            return one if size == len(one.ranked) else one._with_version(Version(after=after, size=size))

        return self.model_copy(update={"tasks": tuple(map(smaller, self.tasks))})

    def with_files(self, files: Mapping[int, Mapping[str, str]]) -> Memory:
        """A copy that names the files of the latest version of some tasks, with their hashes."""

        def named(one: TaskMemory) -> TaskMemory:
            if one.task not in files:
                return one
            latest = one.versions[-1].model_copy(update={"files": dict(files[one.task])})
            return one.model_copy(update={"versions": (*one.versions[:-1], latest)})

        return self.model_copy(update={"tasks": tuple(map(named, self.tasks))})

    def of(self, tasks: Collection[int]) -> Memory:
        """The memory as it was when the run had learned these tasks only."""
        last = max(tasks, default=-1)
        found = []
        for one in self.tasks:
            if one.task in tasks and (then := tuple(version for version in one.versions if version.after <= last)):
                found.append(one.model_copy(update={"versions": then}))
        return self.model_copy(update={"tasks": tuple(found)})

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


class RememberedRows(EncodedRows):
    """The kept examples of a task, under their numbers in it.

    Attributes:
      rows: the kept examples.
      numbers: their numbers in the task, increasing.
      of: number of examples of the task.
    """

    def __init__(self, rows: EncodedRows, numbers: Sequence[int], of: int) -> None:
        """Numbers the rows.

        Raises:
          ValueError: there are more or fewer rows than numbers.
        """
        if len(rows) != len(numbers):
            raise ValueError(f"rows: expected the {len(numbers)} kept examples of {rows.name}, got {len(rows)}")
        self.rows = rows
        self.numbers: Int[np.ndarray, " examples"] = np.asarray(numbers, np.int64)
        self.of = of
        self.group = rows.group
        self.name = rows.name
        self.task = rows.task

    @property
    def sizes(self) -> Int[np.ndarray, "examples 2"]:
        """Sizes of the kept examples."""
        return self.rows.sizes

    def leaves(self) -> list[EncodedRows]:
        """The sources of the whole set."""
        return self.rows.leaves()

    def number(self, index: int) -> int:
        """Number of the example in the task."""
        return int(self.numbers[index])

    def smallest(self, shapes: Sequence[Shape]) -> Int[np.ndarray, " examples"]:
        """See `EncodedRows.smallest`."""
        return self.rows.smallest(shapes)

    def shapes(self, others: Sequence[RememberedRows]) -> list[Shape]:
        """Shapes for the kept examples; give the run's to a pipeline, so that its step is not compiled again."""
        return self.rows.shapes([leaf for other in others for leaf in other.leaves()])

    def row(self, index: int, shape: Shape, noise: Noise) -> RowFields:
        """The row of a kept example; -1 gives a filler row."""
        return self.rows.row(index, shape, noise)

    def describe(self) -> dict[str, Any]:
        """Number of kept examples, of examples they were chosen from, and of kept tokens."""
        return {"examples": len(self), "of": self.of, "tokens": self.total}


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
          rows: the kept examples, encoded, by task; of every task of the memory (of `tasks`, if given).
          config: `prefetch` and `threads` are used.
          batch_size: rows per batch over all processes.
          shapes: shapes for prompt-answer batches; give the run's, so that the step is not compiled again.
          stores: stored signals of the kept examples, by task; none: batches have no `teacher`.
          collate: see `Pipeline`.
          tasks: use only these tasks; none: all.

        Raises:
          UserError: the memory is empty.
          ValueError: there are more or fewer rows than the memory has examples.
        """
        kept = [one for one in memory.tasks if (tasks is None or one.task in tasks) and one.kept]
        super().__init__(
            [RememberedRows(rows[one.task], one.kept, one.count) for one in kept],
            batch_size,
            config,
            shapes=shapes,
            origin="memory",
            fixed_noise=memory.seed,
            lookup=None if stores is None else lambda task, example: stores[task].get(example),
            collate=collate,
        )
