"""Batches from encoded examples: seeded, sharded by process, resumable.

A pipeline is a function from a step's number to its batch. Which examples stand in it follows from seed and step
alone, so the state of an iterator is that number, and every process takes its own rows of the same plan.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxcl.data.labelled import LabelledRows
from jaxcl.data.pairs import PairRows
from jaxcl.data.plan import Plan, Shape, plan_epoch, plan_steps
from jaxcl.data.rows import Noise, Row, Rows
from jaxcl.data.spec import DataConfig
from jaxcl.data.text import Objective, TextRows
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError

FIELDS = ("tokens", "segments", "positions", "predict", "targets", "weights", "labels", "types")
#: Puts the stored records of a batch's rows into arrays whose shapes follow from the batch's shape alone. The record
#: of a filler row is all zeros.
Collate = Callable[[Sequence[Mapping[str, np.ndarray]], Shape], dict[str, np.ndarray]]
#: The stored record of an example of a task.
Lookup = Callable[[int, int], Mapping[str, np.ndarray]]


class CheckpointableIterator(Protocol):
    """An endless iterator over batches whose position can be saved and set (grain's `DatasetIterator`)."""

    def __next__(self) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def get_state(self) -> dict[str, Any]:
        """Position: small and JSON-serialisable."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position that `get_state` gave."""
        ...

    def close(self) -> None:
        """Ends the threads that prepare batches."""
        ...


class Stream(Protocol):
    """What can be iterated over: a pipeline or a mixture of two."""

    prefetch: int
    threads: int

    def batch_at(self, step: int, *, seed: int, process_index: int, process_count: int) -> dict[str, Any]:
        """The batch of a step, the rows of one process.

        Args:
          step: number of the batch, counted over all epochs.
          seed: seed of the shuffle and the masking.
          process_index: which process asks.
          process_count: number of processes.
        """
        ...


class _Steps:
    """A stream as grain's random-access source; without end, because every epoch differs."""

    def __init__(self, stream: Stream, **where: int) -> None:
        self._stream = stream
        self._where = where

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: Any) -> dict[str, Any]:
        return self._stream.batch_at(int(step), **self._where)


def iterate(stream: Stream, seed: int, process_index: int = 0, process_count: int = 1) -> CheckpointableIterator:
    """An endless iterator over a stream's batches, prepared ahead in threads.

    Args:
      stream: a pipeline or a mixture.
      seed: seed of shuffling and masking, the same in all processes.
      process_index: number of this process.
      process_count: number of processes.
    """
    import grain  # here, because grain imports jax

    options = grain.ReadOptions(num_threads=stream.threads, prefetch_buffer_size=stream.prefetch)
    steps = _Steps(stream, seed=seed, process_index=process_index, process_count=process_count)
    return iter(grain.MapDataset.source(steps).to_iter_dataset(options))


class Pipeline:
    """Batches of one or several tasks' examples.

    Attributes:
      sources: the encoded examples; several for joint training or a memory.
      shapes: the shapes of all batches, which are the shapes a step is compiled for.
      batch_size: rows of a batch over all processes.
      steps_per_epoch: batches in which every example appears once.
      kind: `task` or `memory`; goes into every batch.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        batch_size: int,
        config: DataConfig,
        *,
        shapes: Sequence[Shape] | None = None,
        kind: str = "task",
        fixed_noise: int | None = None,
        lookup: Lookup | None = None,
        collate: Collate | None = None,
    ) -> None:
        """Groups the examples into buckets.

        Args:
          sources: encoded examples; at least one.
          batch_size: rows of a batch over all processes.
          config: `prefetch` and `threads` are used.
          shapes: shapes for prompt-answer batches (see `pair_shapes`); none: chosen from `sources`.
          kind: `task` or `memory`.
          fixed_noise: mask the same tokens of a row in every epoch, by this seed; needed where something was stored
            beside the rows.
          lookup: gives what was stored beside a row, from its task and example.
          collate: puts what was stored into arrays; none: stacks it.

        Raises:
          UserError: there is no example.
          ValueError: an example fits none of `shapes`.
        """
        self.sources = list(sources)
        self.batch_size = batch_size
        self.kind = kind
        self.prefetch = config.prefetch
        self.threads = config.threads
        self._fixed_noise = fixed_noise
        self._lookup = lookup
        self._collate = collate or stack_records
        self._offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in self.sources])]).astype(np.int64)
        self.examples = int(self._offsets[-1])
        if self.examples == 0:
            raise UserError(f"{self.sources[0].name if self.sources else 'memory'}: no examples")
        self.shapes: list[Shape] = []
        self._groups: list[int] = []
        self._buckets = np.zeros(self.examples, np.int64)
        for number, group in enumerate(dict.fromkeys(rows.group for rows in self.sources)):
            self._add_group(number, group, shapes if group == PairRows.group else None)
        self.steps_per_epoch = plan_steps(self._buckets, self._groups, batch_size)
        self._plans: dict[tuple[int, int], Plan] = {}

    def _add_group(self, number: int, group: str, shapes: Sequence[Shape] | None) -> None:
        members = [index for index, rows in enumerate(self.sources) if rows.group == group]
        first = self.sources[members[0]]
        chosen = list(shapes) if shapes is not None else first.shapes([self.sources[index] for index in members[1:]])
        start = len(self.shapes)
        limits = np.array([(shape.length, shape.predict or 0) for shape in chosen])
        for index in members:
            # Shapes rise in both numbers: the first one that holds both is the smallest.
            fits: np.ndarray = np.all(self.sources[index].sizes[:, None, :] <= limits[None], axis=2)
            if not fits.any(axis=1).all():
                raise ValueError(
                    f"shapes {chosen}: expected room for every example, {self.sources[index].name} has none"
                )
            self._buckets[self._offsets[index] : self._offsets[index + 1]] = start + fits.argmax(axis=1)
        self.shapes += chosen
        self._groups += [number] * len(chosen)

    def train(self, seed: int, process_index: int = 0, process_count: int = 1) -> CheckpointableIterator:
        """An endless iterator, shuffled anew every epoch; see `iterate`."""
        return iterate(self, seed, process_index, process_count)

    def batch_at(self, step: int, *, seed: int, process_index: int = 0, process_count: int = 1) -> dict[str, Any]:
        """The batch of a step, the rows of one process: a pure function of its arguments.

        Args:
          step: number of the batch, counted over all epochs.
          seed: seed of the shuffle and the masking.
          process_index: which process asks.
          process_count: number of processes.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        plan = self._plan(seed, epoch)
        noise = (seed, epoch) if self._fixed_noise is None else (self._fixed_noise, 0)
        return self._build(plan, place, noise, process_index, process_count)

    def once(
        self, limit: int | None = None, seed: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, Any]]:
        """One pass; the last batch of a shape group is completed with filler rows.

        Args:
          limit: take only so many examples, the first of a shuffle by `seed`; none: all.
          seed: seed of that shuffle and of the masking; none: the first examples in order, masked by seed 0.
          process_index: number of this process.
          process_count: number of processes.
        """
        kept = np.arange(self.examples)
        if seed is not None:
            kept = np.random.default_rng((seed, 0)).permutation(kept)
        kept = np.sort(kept[:limit])
        plan = plan_epoch(self._buckets[kept], self._groups, self.batch_size, 0, None)
        plan = Plan(plan.shapes, np.where(plan.rows >= 0, kept[plan.rows], -1))
        noise = (seed or 0, 0) if self._fixed_noise is None else (self._fixed_noise, 0)
        for place in range(len(plan.shapes)):
            yield self._build(plan, place, noise, process_index, process_count)

    def _plan(self, seed: int, epoch: int) -> Plan:
        key = (seed, epoch)
        plan = self._plans.get(key)
        if plan is None:
            plan = plan_epoch(self._buckets, self._groups, self.batch_size, seed, epoch)
            # Threads that read ahead may stand in the next epoch already: keep two. A plan computed twice by two
            # threads is the same plan.
            self._plans = dict([*self._plans.items(), (key, plan)][-2:])
        return plan

    def _build(self, plan: Plan, place: int, noise: Noise, process_index: int, process_count: int) -> dict[str, Any]:
        if self.batch_size % process_count:
            raise UserError(f"the batch of {self.batch_size} rows cannot be split over {process_count} processes")
        share = self.batch_size // process_count
        indices = plan.rows[place, process_index * share : (process_index + 1) * share]
        shape = self.shapes[plan.shapes[place]]
        group = self._groups[plan.shapes[place]]
        rows, tasks, examples = [], [], []
        for index in indices:
            # A filler row belongs to the first source of its batch's group.
            number = int(np.searchsorted(self._offsets, index, side="right") - 1) if index >= 0 else self._first(group)
            source = self.sources[number]
            local = int(index - self._offsets[number]) if index >= 0 else -1
            examples.append(source.number(local) if index >= 0 else -1)
            rows.append(source.row(local, shape, (*noise, source.task, max(examples[-1], 0))))
            tasks.append(source.task)
        batch = self._stack(rows, tasks, examples)
        if self._lookup is not None:
            batch["teacher"] = self._collate(
                self._records(self._lookup, tasks, examples, int(plan.rows[place, 0])), shape
            )
        return batch

    def _records(
        self, lookup: Lookup, tasks: list[int], examples: list[int], first: int
    ) -> list[Mapping[str, np.ndarray]]:
        records = [
            lookup(task, example) if example >= 0 else None for task, example in zip(tasks, examples, strict=True)
        ]
        if None not in records:
            return [record for record in records if record is not None]
        # All rows of this process may be fillers; the first row of the whole batch never is one.
        number = int(np.searchsorted(self._offsets, first, side="right") - 1)
        source = self.sources[number]
        model = lookup(source.task, source.number(first - int(self._offsets[number])))
        zeros = {name: np.zeros_like(value) for name, value in model.items()}
        return [zeros if record is None else record for record in records]

    def _first(self, group: int) -> int:
        names = list(dict.fromkeys(rows.group for rows in self.sources))
        return next(index for index, rows in enumerate(self.sources) if rows.group == names[group])

    def _stack(self, rows: list[Row], tasks: list[int], examples: list[int]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            field: np.stack([row[field] for row in rows]) if field in rows[0] else None for field in FIELDS
        }
        batch["task"] = np.array(tasks, np.int32)
        batch["example"] = np.array(examples, np.int32)
        batch["teacher"] = None
        batch["kind"] = self.kind
        return batch

    def describe(self) -> dict[str, Any]:
        """Counts for the log and the report: steps, shapes, share of real tokens, and each source's own counts."""
        padded = sum(int((self._buckets == index).sum()) * shape.length for index, shape in enumerate(self.shapes))
        tokens = sum(int(rows.sizes[:, 0].sum()) for rows in self.sources)
        return {
            "examples": self.examples,
            "batch_size": self.batch_size,
            "steps_per_epoch": self.steps_per_epoch,
            "shapes": [list(shape) for shape in self.shapes],
            "real_token_share": round(tokens / padded, 4),
            "sources": {rows.name: rows.describe() for rows in self.sources},
        }


def stack_records(records: Sequence[Mapping[str, np.ndarray]], shape: Shape) -> dict[str, np.ndarray]:
    """Stacks records whose arrays have equal shapes."""
    return {name: np.stack([record[name] for record in records]) for name in records[0]}


class PairPipeline(Pipeline):
    """Batches of prompt-answer pairs in a few length buckets; see `PairRows`."""

    def __init__(
        self,
        texts: Sequence[Mapping[str, str]],
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        batch_size: int,
        task: int = 0,
        name: str = "task",
        shapes: Sequence[Shape] | None = None,
    ) -> None:
        """Encodes all pairs.

        Args:
          texts: rows with `prompt` and `answer`.
          tokenizer: the model's tokenizer.
          config: the `data` section of the configuration.
          batch_size: rows of a batch.
          task: number of the task.
          name: name of the task, for messages.
          shapes: shapes that batches may have; none: chosen from the data.
        """
        rows = PairRows(texts, tokenizer, config, task=task, name=name)
        super().__init__([rows], batch_size, config, shapes=shapes)


class TextPipeline(Pipeline):
    """Batches of running text, packed or a passage a row; see `TextRows`."""

    def __init__(
        self,
        texts: Sequence[Mapping[str, str]],
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        objective: Objective,
        batch_size: int,
        task: int = 0,
        name: str = "task",
    ) -> None:
        """Encodes and packs all passages.

        Args:
          texts: rows with `text`.
          tokenizer: the model's tokenizer.
          config: the `data` section of the configuration.
          objective: `causal` or `masked`.
          batch_size: rows of a batch.
          task: number of the task.
          name: name of the task, for messages.
        """
        rows = TextRows(texts, tokenizer, config, objective=objective, task=task, name=name)
        super().__init__([rows], batch_size, config)


class LabelledPipeline(Pipeline):
    """Batches of labelled texts, for end tasks; see `LabelledRows`."""

    def __init__(
        self,
        texts: Sequence[Mapping[str, str]],
        labels: Sequence[str],
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        masked: bool,
        batch_size: int,
        task: int = 0,
        name: str = "task",
        token_types: int = 1,
    ) -> None:
        """Encodes all texts.

        Args:
          texts: rows with `text`, `label` and perhaps `pair`.
          labels: class names.
          tokenizer: the model's tokenizer.
          config: the `data` section of the configuration.
          masked: the model is an encoder.
          batch_size: rows of a batch.
          task: number of the task.
          name: name of the task, for messages.
          token_types: token types that the model knows.
        """
        rows = LabelledRows(
            texts, labels, tokenizer, config, masked=masked, task=task, name=name, token_types=token_types
        )
        super().__init__([rows], batch_size, config)
