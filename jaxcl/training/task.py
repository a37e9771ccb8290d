"""The current task as methods see it, and the records that they store with its remembered rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, PyTree

from jaxcl.data.rows import HostBatch
from jaxcl.functional.losses import real_length
from jaxcl.models.batch import Batch
from jaxcl.sharding.layout import Layout
from jaxcl.training.compile import Compiler
from jaxcl.training.feed import place_batch
from jaxcl.training.loops import Loops
from jaxcl.training.state import TrainState
from jaxcl.training.stored import Record, trim
from jaxcl.training.trainer import Trainer


class ExampleSource(Protocol):
    """Examples in batches, this process's rows only; the last batch is completed with filler rows."""

    def once(self, limit: int | None, seed: int) -> Iterator[HostBatch]:
        """One pass over (the first `limit` of a shuffle by `seed` of) the examples."""
        ...


class RunningTask:
    """The current task; implements `jaxcl.methods.base.Task`.

    Attributes:
      index: position of the task in the sequence.
      name: its name.
      count: number of tasks in the sequence.
      key: a random key of this task and stage.
      compile: `jax.jit` with the run's shardings.
    """

    def __init__(
        self,
        *,
        index: int,
        name: str,
        count: int,
        key: Array,
        seed: int,
        pipeline: ExampleSource,
        memory: ExampleSource | None,
        params_before: Callable[[], PyTree],
        compiler: Compiler,
        loops: Loops | None = None,
    ) -> None:
        """Describes a task; nothing is read yet.

        Args:
          index: position of the task in the sequence.
          name: its name.
          count: number of tasks in the sequence.
          key: a random key; `prepare` and `consolidate` get different ones.
          seed: seed of the shuffle of `examples`.
          pipeline: its training examples.
          memory: its examples that go into the memory; `None`: none.
          params_before: reads the params from before the task.
          compiler: the run's compiler.
          loops: those of the run, which may be stopped; `None`: they run through.
        """
        self.index = index
        self.name = name
        self.count = count
        self.key = key
        self.compile = compiler
        self._seed = seed
        self._pipeline = pipeline
        self._memory = memory
        self._params_before = params_before
        self._loops = loops or Loops()

    @property
    def layout(self) -> Layout:
        """The shardings of the run."""
        return self.compile.layout

    def examples(self, limit: int | None = None) -> Iterator[Batch]:
        """One pass over (the first `limit` of a seeded shuffle of) the task's training examples."""
        return map(self._place, self._rows(limit, memory=False))

    def memory(self, through: Callable[[Iterable[HostBatch]], Iterable[HostBatch]] = iter) -> Iterator[Batch]:
        """One pass over the examples of this task that go into the memory; empty without a memory.

        Args:
          through: chooses batches while they are on the host.
        """
        return map(self._place, through(self._rows(None, memory=True)))

    def fold(
        self, add: Callable[[Any, Batch], Any], start: PyTree, *, limit: int | None = None, memory: bool = False
    ) -> PyTree:
        """`start` with every batch added, of the examples or of the memory; see `jaxcl.methods.base.Task`."""
        rows = self._rows(limit, memory=memory)
        return self._loops.fold(lambda total, batch: add(total, self._place(batch)), start, rows)

    def params_before(self) -> PyTree:
        """The params from before this task, read from the checkpoint at every call."""
        return self._params_before()

    def _rows(self, limit: int | None, *, memory: bool) -> Iterator[HostBatch]:
        source = self._memory if memory else self._pipeline
        return iter(()) if source is None else source.once(None if memory else limit, self._seed)

    def _place(self, rows: HostBatch) -> Batch:
        return place_batch(rows, self.layout.batch)


def signal_records(
    trainer: Trainer,
    state: TrainState,
    task: RunningTask,
    through: Callable[[Iterable[HostBatch]], Iterable[HostBatch]] = iter,
) -> Iterator[tuple[int, Record]]:
    """Runs `Method.signals` over the task's memory: the records to store with the remembered rows.

    Each process gets the rows on its own devices; the rows of a batch are read while the next batch is computed. Filler
    rows (`example` < 0) are left out.

    Args:
      trainer: the run's trainer.
      state: the state after `Method.consolidate`.
      task: the task just learned.
      through: chooses batches while they are on the host.

    Yields:
      The example's number in its task, and its record without padding; nothing if the method stores nothing.
    """
    signals = trainer.compile.per_row(trainer.method.signals)
    pending: dict[str, Array] | None = None
    for batch in task.memory(through):
        records = signals(state.params, state.method_state, batch, task.key)
        if records is None:
            return
        sizes = {_EXAMPLE: batch.example, _LENGTH: real_length(batch.segments), _PREDICT: real_length(batch.weights)}
        previous, pending = pending, records | sizes
        yield from _real_rows(trainer, previous)
    yield from _real_rows(trainer, pending)


# Names of the row sizes that are sent to the host with the signals of a batch.
_EXAMPLE, _LENGTH, _PREDICT = "/example", "/length", "/predict"


def _real_rows(trainer: Trainer, pending: dict[str, Array] | None) -> Iterator[tuple[int, Record]]:
    if pending is None:
        return
    rows = {name: _local_rows(value) for name, value in pending.items()}
    examples, length, predict = (rows.pop(name) for name in (_EXAMPLE, _LENGTH, _PREDICT))
    for row, example in enumerate(examples):
        if example >= 0:
            record = {name: value[row] for name, value in rows.items()}
            sizes = {"length": int(length[row]), "predict": int(predict[row])}
            yield int(example), trim(record, trainer.method.stored, **sizes)


def _local_rows(array: Array) -> np.ndarray:
    """The rows on this process's devices, in order, each only once (an array may be replicated over `tensor`)."""
    if array.is_fully_addressable:
        return np.asarray(array)
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
