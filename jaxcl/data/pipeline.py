"""Batches from encoded examples: seeded, sharded by process, resumable.

A pipeline is a function from the number of a step to its batch. The examples in it follow from seed and step alone, so
the state of an iterator is the step's number, and every process takes its own rows of the same plan.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol, cast

import numpy as np
from jaxtyping import Int

from jaxcl.data.labelled import LabelledRows
from jaxcl.data.pairs import PairRows
from jaxcl.data.plan import Plan, Shape, plan_epoch, plan_steps
from jaxcl.data.rows import EncodedRows, HostBatch, Noise, RowFields
from jaxcl.data.spec import DataConfig
from jaxcl.data.text import Objective, TextRows
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError

FIELDS = tuple(RowFields.__annotations__)
# Batches without images do not have them at all.
_IMAGE_FIELDS = ("pixels", "image_index")
#: Collates the stored records of a batch's rows (`None` for filler rows) into arrays whose shapes depend on the batch's
#: shape only.
Collate = Callable[[Sequence[Mapping[str, np.ndarray] | None], Shape], dict[str, np.ndarray]]
#: The stored record of an example of a task.
Lookup = Callable[[int, int], Mapping[str, np.ndarray]]


class CheckpointableIterator(Protocol):
    """An endless iterator over batches whose position can be saved and restored (grain's `DatasetIterator`)."""

    def __next__(self) -> HostBatch: ...

    def __iter__(self) -> Iterator[HostBatch]: ...

    def get_state(self) -> dict[str, Any]:
        """The position; small and JSON-serialisable."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position that `get_state` returned."""
        ...

    def close(self) -> None:
        """Stops the prefetch threads."""
        ...


class Stream(Protocol):
    """Batches to train on: a pipeline, or several whose batches take turns."""

    prefetch: int
    threads: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch."""
        ...

    @property
    def own_steps_per_epoch(self) -> int:
        """Batches of the task in one epoch, without those that were added to them."""
        ...

    def steps_for(self, own_steps: int) -> int:
        """Batches that hold `own_steps` batches of the task, and what was added to them."""
        ...

    def own_steps_in(self, steps: int) -> int:
        """Batches of the task among the first `steps` batches."""
        ...

    def batch_at(self, step: int, *, seed: int, process_index: int, process_count: int) -> HostBatch:
        """One process's rows of the batch of a step.

        Args:
          step: number of the batch, counted over all epochs.
          seed: seed of the shuffle and the masking.
          process_index: which process asks.
          process_count: number of processes.
        """
        ...

    def train(self, seed: int, process_index: int = 0, process_count: int = 1) -> CheckpointableIterator:
        """An endless iterator over the batches; see `iterate`."""
        ...

    def describe(self) -> dict[str, Any]:
        """Counts for the log and the report."""
        ...


class _Steps:
    """A stream as a random-access source for grain; endless, because every epoch differs."""

    def __init__(self, stream: Stream, **where: int) -> None:
        self._stream = stream
        self._where = where

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: Any) -> HostBatch:
        return self._stream.batch_at(int(step), **self._where)


def iterate(stream: Stream, seed: int, process_index: int = 0, process_count: int = 1) -> CheckpointableIterator:
    """An endless iterator over a stream's batches, prefetched in threads.

    Args:
      stream: a pipeline or a mixture.
      seed: seed of shuffling and masking, the same in all processes.
      process_index: index of this process.
      process_count: number of processes.
    """
    import grain  # imported here, because grain imports jax

    options = grain.ReadOptions(num_threads=stream.threads, prefetch_buffer_size=stream.prefetch)
    steps = _Steps(stream, seed=seed, process_index=process_index, process_count=process_count)
    return iter(grain.MapDataset.source(steps).to_iter_dataset(options))


class Pipeline:
    """Batches of the examples of one or several tasks.

    Attributes:
      sources: the encoded examples; several for joint training or a memory.
      shapes: the shapes of all batches; a step is compiled for each of them.
      batch_size: rows per batch over all processes.
      steps_per_epoch: batches in which every example appears once.
      origin: `task`, `memory` or `general`; a field of every batch.
    """

    def __init__(
        self,
        sources: Sequence[EncodedRows],
        batch_size: int,
        config: DataConfig,
        *,
        shapes: Sequence[Shape] | None = None,
        origin: str = "task",
        fixed_noise: int | None = None,
        lookup: Lookup | None = None,
        collate: Collate | None = None,
    ) -> None:
        """Groups the examples into buckets.

        Args:
          sources: encoded examples; at least one.
          batch_size: rows per batch over all processes.
          config: `prefetch` and `threads` are used.
          shapes: shapes for prompt-answer batches (see `pair_shapes`); none: chosen from `sources`.
          origin: `task`, `memory` or `general`.
          fixed_noise: seed that masks the same tokens of a row in every epoch; required for rows with stored signals.
          lookup: returns the stored record of a row, given its task and example.
          collate: collates the stored records of a batch; required with `lookup`.

        Raises:
          UserError: there are no examples.
          ValueError: an example does not fit any of `shapes`, or `collate` is missing.
        """
        if lookup is not None and collate is None:
            raise ValueError("collate: required with lookup, got None")
        self.sources = list(sources)
        self.batch_size = batch_size
        self.origin = origin
        self.prefetch = config.prefetch
        self.threads = config.threads
        self._fixed_noise = fixed_noise
        self._lookup = lookup
        self._collate = collate
        self._offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in self.sources])]).astype(np.int64)
        self.examples = int(self._offsets[-1])
        if self.examples == 0:
            raise UserError(f"{self.sources[0].name if self.sources else 'memory'}: no examples")
        self.shapes: list[Shape] = []
        self._groups: list[int] = []
        self._buckets = np.zeros(self.examples, np.uint8)
        for number, group in enumerate(dict.fromkeys(rows.group for rows in self.sources)):
            self._add_group(number, group, shapes if group == PairRows.group else None)
        self.steps_per_epoch = plan_steps(self._buckets, self._groups, batch_size)
        self._plans: dict[tuple[int, ...], Plan] = {}

    def _add_group(self, number: int, group: str, shapes: Sequence[Shape] | None) -> None:
        members = [index for index, rows in enumerate(self.sources) if rows.group == group]
        first, *others = (leaf for index in members for leaf in self.sources[index].leaves())
        chosen = list(shapes) if shapes is not None else first.shapes(others)
        start = len(self.shapes)
        for index in members:
            smallest = self.sources[index].smallest(chosen)
            if smallest.max(initial=0) >= len(chosen):
                raise ValueError(
                    f"shapes {chosen}: expected room for every example, one of {self.sources[index].name} does not fit"
                )
            self._buckets[self._offsets[index] : self._offsets[index + 1]] = start + smallest
        self.shapes += chosen
        self._groups += [number] * len(chosen)

    @property
    def own_steps_per_epoch(self) -> int:
        """All batches of an epoch."""
        return self.steps_per_epoch

    def steps_for(self, own_steps: int) -> int:
        """The same number: all batches are the task's."""
        return own_steps

    def own_steps_in(self, steps: int) -> int:
        """The same number: all batches are the task's."""
        return steps

    @property
    def tokens_per_step(self) -> Fraction:
        """Mean number of tokens of a batch."""
        return Fraction(sum(rows.total for rows in self.sources), self.steps_per_epoch)

    def train(self, seed: int, process_index: int = 0, process_count: int = 1) -> CheckpointableIterator:
        """An endless iterator, reshuffled every epoch; see `iterate`."""
        return iterate(self, seed, process_index, process_count)

    def batch_at(self, step: int, *, seed: int, process_index: int = 0, process_count: int = 1) -> HostBatch:
        """One process's rows of the batch of a step; a pure function of its arguments.

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
    ) -> Iterator[HostBatch]:
        """One pass; the last batch of a shape group is completed with filler rows.

        Args:
          limit: largest number of examples, the first ones of a shuffle by `seed`; none: all.
          seed: seed of that shuffle and of the masking; none: the first examples in order, masked by seed 0.
          process_index: index of this process.
          process_count: number of processes.
        """
        kept = np.arange(self.examples)
        if seed is not None:
            kept = np.random.default_rng((seed, 0)).permutation(kept)
        yield from self._pass(np.sort(kept[:limit]), seed, process_index, process_count)

    def _pass(
        self, kept: Int[np.ndarray, " kept"], seed: int | None, process_index: int, process_count: int
    ) -> Iterator[HostBatch]:
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
            # Prefetch threads may be in the next epoch already, so two plans are kept. Two threads that compute the
            # same plan get equal results.
            self._plans = dict([*self._plans.items(), (key, plan)][-2:])
        return plan

    def _build(self, plan: Plan, place: int, noise: Noise, process_index: int, process_count: int) -> HostBatch:
        if self.batch_size % process_count:
            raise UserError(f"the batch of {self.batch_size} rows cannot be split over {process_count} processes")
        share = self.batch_size // process_count
        indices = plan.rows[place, process_index * share : (process_index + 1) * share]
        shape = self.shapes[plan.shapes[place]]
        group = self._groups[plan.shapes[place]]
        rows, tasks, examples = [], [], []
        for index in indices:
            # A filler row counts as one of the first source of its batch's group.
            number = int(np.searchsorted(self._offsets, index, side="right") - 1) if index >= 0 else self._first(group)
            source = self.sources[number]
            local = int(index - self._offsets[number]) if index >= 0 else -1
            examples.append(source.number(local) if index >= 0 else -1)
            rows.append(source.row(local, shape, (*noise, source.task, max(examples[-1], 0))))
            tasks.append(source.task)
        batch = self._stack(rows, tasks, examples)
        if self._lookup is not None and self._collate is not None:
            lookup = self._lookup
            stored = [None if row < 0 else lookup(task, row) for task, row in zip(tasks, examples, strict=True)]
            batch["teacher"] = self._collate(stored, shape)
        return batch

    def _first(self, group: int) -> int:
        names = list(dict.fromkeys(rows.group for rows in self.sources))
        return next(index for index, rows in enumerate(self.sources) if rows.group == names[group])

    def _stack(self, rows: Sequence[Mapping[str, Any]], tasks: list[int], examples: list[int]) -> HostBatch:
        fields = [field for field in FIELDS if field in rows[0] or field not in _IMAGE_FIELDS]
        batch: dict[str, Any] = {
            field: np.stack([row[field] for row in rows]) if field in rows[0] else None for field in fields
        }
        batch["task"] = np.array(tasks, np.int32)
        batch["example"] = np.array(examples, np.int32)
        batch["teacher"] = None
        batch["origin"] = self.origin
        return cast(HostBatch, batch)

    def describe(self) -> dict[str, Any]:
        """Counts for the log and the report: steps, shapes, share of real tokens, and the counts of each source."""
        padded = sum(int((self._buckets == index).sum()) * shape.length for index, shape in enumerate(self.shapes))
        tokens = sum(rows.total for rows in self.sources)
        return {
            "examples": self.examples,
            "batch_size": self.batch_size,
            "steps_per_epoch": self.steps_per_epoch,
            "shapes": [list(shape if shape.images else shape[:2]) for shape in self.shapes],
            "real_token_share": round(tokens / padded, 4),
            "sources": {rows.name: rows.describe() for rows in self.sources},
        }


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
    """Batches of running text, packed or one passage per row; see `TextRows`."""

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
