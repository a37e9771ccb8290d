"""What comes before and after the steps of a task: where they start, what is remembered, consolidated and stored."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcl.data.teacher_store import Record, TeacherStore, write_records
from jaxcl.errors import UserError
from jaxcl.evaluation.results import write_tables
from jaxcl.methods.base import Method
from jaxcl.run.components import Components, initial_params
from jaxcl.run.folder import RunFolder
from jaxcl.run.note import note_of
from jaxcl.run.remembering import (
    Kept,
    remember,
    remember_written,
    remove_unneeded,
    save_kept,
    text_of,
)
from jaxcl.run.stopwatch import Stopwatch
from jaxcl.run.stores import StorePrints, written_stores
from jaxcl.run.synthesis import Writer, write_samples
from jaxcl.run.tasks import Stage, running_task
from jaxcl.run.trunk import back_to_trunk, starts_anew
from jaxcl.sharding.processes import on_first, wait_for_all
from jaxcl.training.checkpoint import Checkpoints, Saved
from jaxcl.training.kept import START_MARK, mark_after
from jaxcl.training.keys import run_key
from jaxcl.training.loops import Loops
from jaxcl.training.state import TrainState
from jaxcl.training.task import RunningTask, signal_records

_STEPS = ("consolidate", "final_params", "signals", "tables")


class Consolidation:
    """The part of a run between the steps of its tasks.

    Attributes:
      parts: the parts of the run.
      folder: its folder.
      checkpoints: the series in it.
      kept: what is remembered.
      stores: digests of what is stored with it.
      main: whether this is process 0.
      stopwatch: takes the time.
      loops: over examples, memory and what is scored.
    """

    parts: Components
    folder: RunFolder
    checkpoints: Checkpoints
    kept: Kept
    stores: StorePrints
    main: bool
    stopwatch: Stopwatch
    loops: Loops

    def _timed(self, part: str) -> contextlib.AbstractContextManager[None]:
        """Adds the seconds of a block to a part of the run's time; see `Stopwatch.part`."""
        return self.stopwatch.part(part)

    @property
    def _concludes(self) -> bool:
        """Whether anything is done after a task's last step that takes time."""
        method = self.parts.method
        own = any(getattr(type(method), name) is not getattr(Method, name) for name in _STEPS)
        return own or (method.replay is not None and not method.joint)

    def _prepare(self, state: TrainState, index: int) -> TrainState:
        """What a task's training starts from, but for schedule and moments; the method sees the model before it."""
        parts = self.parts
        if parts.method.individual and index > 0:
            with self._timed("setup"):
                state = self._restart(state)
        consolidated = state.method_state
        with self._timed("method"), self.loops.phase(f"before {index}"):
            prepared = parts.method.prepare(state.params, consolidated, self._task(index, stage="before"))
        state = parts.trainer.with_method_state(state, prepared)
        if starts_anew(parts, index) or not parts.config.optimizer.goes_on_before_decay:
            return state
        with self._timed("checkpoints"):
            return back_to_trunk(
                parts, self.checkpoints, state, self._task(index - 1, stage="after"), consolidated=consolidated
            )

    def _restart(self, state: TrainState) -> TrainState:
        """The initial state of the run, except that the count of steps continues."""
        step = state.step
        # The old arrays are deleted before the new ones are created, so that memory never holds both.
        jax.tree.map(lambda leaf: leaf.delete(), (state.params, state.opt_state, state.method_state, state.low_bits))
        return self.parts.trainer.init(initial_params(self.parts)).replace(step=step)

    def _conclude(self, state: TrainState, index: int) -> TrainState:
        """Chooses what is remembered, lets the method consolidate, and stores its signals for the memory."""
        state = self._consolidate(state, index)
        self._store(state, index)
        return state

    def _consolidate(self, state: TrainState, index: int) -> TrainState:
        """Chooses what is remembered, and lets the method consolidate."""
        parts, method = self.parts, self.parts.method
        self._forget_unneeded()
        if method.replay is not None and not method.joint:
            self.kept = self._remember(state, index)
        task = self._task(index, stage="after")
        new = method.consolidate(state.params, state.method_state, task)
        state = parts.trainer.with_method_state(state, new)
        return parts.trainer.with_params(state, method.final_params(state.params, state.method_state, task))

    def _store(self, state: TrainState, index: int) -> None:
        """Stores the method's signals for what is remembered of a task, and its tables."""
        method, task = self.parts.method, self._task(index, stage="after")
        on_first(lambda: self._remove_stores(index))
        written = self._write_store(state, task)
        wait_for_all(f"signals of task {index} stored")
        files = written_stores(self.folder, index, written=written)
        self.stores = {**self.stores, str(index): files} if files else self.stores
        # By all processes together: the state may be split over them.
        tables = task.compile(method.tables)(state.method_state)
        if self.main and tables:
            write_tables(self.folder.importance, index, {name: np.asarray(value) for name, value in tables.items()})

    def _write_store(self, state: TrainState, task: RunningTask) -> bool:
        """Writes this process's store; returns whether it has one. If it is stopped, it keeps a store of its rows."""
        place = self.folder.store(task.index, jax.process_index())
        part = self.loops.part(place)
        loop = self.loops.loop(fits=lambda values: values == [_digest(part)])
        earlier = _records(part) if loop.kept is not None and loop.kept[0] else iter(())
        records = itertools.chain(earlier, signal_records(self.parts.trainer, state, task, loop.rest))
        if (first := next(records, None)) is not None:
            write_records(part, itertools.chain([first], records), self.parts.about(self.kept.task(task.index)))
        # A store can be large: only one that is continued later is read again. What is whole fits nothing.
        loop.end([("" if first is None else _digest(part)) if loop.stopped else None])
        if first is not None:
            place.parent.mkdir(exist_ok=True)
            part.replace(place)
        return first is not None

    def _remember(self, state: TrainState, index: int) -> Kept:
        """What is remembered once a task is learned, written to the run folder."""
        parts, replay = self.parts, self.parts.method.replay
        if replay is None or replay.source == "kept":
            kept = remember(parts, self.kept, index, state.params, self.loops)
            return save_kept(self.folder, self.kept, kept, lambda: text_of(parts, kept.task(index), kept.tables[index]))
        key = jax.random.fold_in(run_key(parts.config.seed, "samples"), index)
        begun = replay.synthetic.writer == "start"
        opened_by = initial_params(parts) if begun else self._params_before(index)
        rows, dropped = write_samples(Writer(parts, index, opened_by, state.params), key)
        return save_kept(self.folder, self.kept, remember_written(parts, self.kept, index, rows, dropped), lambda: rows)

    def _forget_unneeded(self) -> None:
        """Removes examples that gave way to those of later tasks and that no checkpoint needs any more."""
        if any(len(one.versions) > 1 for one in self.kept.memory.tasks):
            self.checkpoints.wait()
            try:
                learned = [map(int, note_of(saved).memory) for saved in self.checkpoints.notes()]
            except UserError:  # of another version: nobody knows what it needs
                return
            on_first(lambda: remove_unneeded(self.folder, self.kept.memory, learned))

    def _task(self, index: int, stage: Stage) -> RunningTask:
        """The task as the method sees it before or after training on it."""
        params_before = partial(self._params_before, index)
        loops = self.loops
        return running_task(self.parts, self.kept, index, stage=stage, params_before=params_before, loops=loops)

    @property
    def _asks_for_before(self) -> bool:
        """Whether the params before a task are asked for once it is trained, and come from a checkpoint."""
        method = self.parts.method
        replay = method.replay
        writes = replay is not None and replay.source != "kept" and replay.synthetic.writer != "start"
        return (method.asks_for_before or writes) and not method.individual

    def _params_before(self, index: int) -> Any:
        if self.parts.method.individual:
            return initial_params(self.parts)
        saved = self._saved_before(index)
        return self.checkpoints.params(self.parts.trainer.target.params, saved)

    def _saved_before(self, index: int) -> Saved:
        """The checkpoint from before a task.

        Raises:
          UserError: it is missing or damaged.
        """
        mark = START_MARK if index == 0 else mark_after(index - 1)
        saved = self.checkpoints.find(mark)
        if saved is None:
            raise UserError(
                f"checkpoints {self.folder.checkpoints}: the one {mark} is missing; the run cannot be resumed"
            )
        return saved

    def _remove_stores(self, index: int) -> None:
        """Removes the files of an interrupted attempt, which may have had more processes or not have ended."""
        unfinished = self.folder.teacher.glob(f".task{index:02d}_process*.tmp")
        for path in [*self.folder.stores(index), *unfinished]:
            path.unlink()


def _digest(store: Path) -> str:
    """The SHA-256 of a file; empty where there is none."""
    if not store.is_file():
        return ""
    with open(store, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _records(store: Path) -> Iterator[tuple[int, Record]]:
    """What a store was written from."""
    opened = TeacherStore.open(store)
    return ((key, opened[position]) for position, key in enumerate(opened.keys))
