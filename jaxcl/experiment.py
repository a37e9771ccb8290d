"""A run: one model through a sequence of tasks, evaluated after each, resumable at any point."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl.components import Components, ProcessShare, build, initial_params
from jaxcl.config import ExperimentConfig
from jaxcl.data.memory import Memory, MemoryPipeline
from jaxcl.data.mix import Mixture
from jaxcl.data.pipeline import Pipeline
from jaxcl.data.teacher_store import TeacherStore, write_records
from jaxcl.errors import UserError
from jaxcl.evaluation.matrix import ContinualMatrix
from jaxcl.evaluation.results import Measure, Results, installed_versions, measure, write_predictions, write_tables
from jaxcl.evaluator import Evaluator, answering_params, scored_tasks
from jaxcl.reporting.report import write_report
from jaxcl.run_folder import RunFolder
from jaxcl.sharding.processes import initialize
from jaxcl.training.checkpoint import Checkpoints, Saved
from jaxcl.training.compile import enable_compilation_cache
from jaxcl.training.config import task_steps
from jaxcl.training.loop import train_task
from jaxcl.training.sinks import Sink, open_sinks
from jaxcl.training.state import TrainState
from jaxcl.training.task import RunningTask, collect_signals

Stream = Pipeline | Mixture
Record = dict[str, np.ndarray]


class Outcome(NamedTuple):
    """What a run leaves behind."""

    results: Results
    report: Path


def run(config: ExperimentConfig) -> Outcome:
    """Trains through the sequence of tasks and evaluates after each.

    Goes on where it stopped when the run folder holds an interrupted run of the same configuration, and returns what
    is there when it holds a finished one.

    Args:
      config: the configuration.

    Returns:
      The results, and the path of the report.

    Raises:
      UserError: something the configuration names cannot be used; what was saved before is intact.
      KeyboardInterrupt: interrupted; the state was saved.
    """
    initialize()
    _keep_compiled_programs()
    folder = RunFolder(Path(config.output))
    try:
        if jax.process_index() == 0:
            folder.claim(config.plain())
        if folder.results.is_file() and (results := Results.read(folder.results)).finished:
            return Outcome(results, write_report(folder.path))
        parts = build(config, folder)
        keep = config.training.keep, config.training.keep_tasks
        with Checkpoints(folder.checkpoints, keep=keep[0], keep_marked=keep[1]) as checkpoints:
            results = TaskSequence(parts, folder, checkpoints).run()
        return Outcome(results, write_report(folder.path))
    finally:
        folder.release()


def _keep_compiled_programs() -> None:
    """Keeps compiled programs in the user's cache, unless jax was told where: other seeds and later runs use them."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxcl"
        with contextlib.suppress(UserError):  # a home that cannot be written to only costs time
            enable_compilation_cache(cache)


class TaskSequence:
    """One run through the tasks. Everything it needs to go on later lies in the run folder."""

    def __init__(self, parts: Components, folder: RunFolder, checkpoints: Checkpoints) -> None:
        self.parts = parts
        self.config = parts.config
        self.folder = folder
        self.checkpoints = checkpoints
        self.evaluator = Evaluator(parts)
        self.main = jax.process_index() == 0
        self.results = self._read_results()
        self.memory = Memory.load(folder.memory) if folder.memory.is_file() else Memory(seed=self.config.seed)
        self.sinks: list[Sink] = []
        self.timing: dict[str, float] = dict(self.results.timing)

    @property
    def phases(self) -> int:
        """How often the model is trained: once a task, or once on all of them."""
        return 1 if self.parts.method.joint else len(self.parts.tasks)

    def run(self) -> Results:
        """Trains and evaluates from wherever the run folder stands to the end."""
        saved = self.checkpoints.latest()
        if saved is None:
            with self._timed("setup"):
                state = self.parts.trainer.init(initial_params(self.parts))
            self._save(state, task=-1, phase="learned", mark="before the first task")
            position = None
        else:
            state, position = self.checkpoints.restore(self.parts.trainer.target, saved)
            self.timing = dict(saved.progress["timing"])
        if self.main:
            self.sinks = open_sinks(self.folder.path, after=int(state.step))
        try:
            return self._go_on(state, position, saved)
        finally:
            for sink in self.sinks:
                sink.close()

    def _go_on(self, state: TrainState, position: Any, saved: Saved | None) -> Results:
        task, phase = (-1, "learned") if saved is None else (saved.progress["task"], saved.progress["phase"])
        if phase == "learned":
            self._evaluate(state, task)
            task, position = task + 1, None
        for index in range(task, self.phases):
            state = self._learn(state, index, position)
            position = None
            self._evaluate(state, index)
        self._write_results(finished=True)
        return self.results

    # Learning one task

    def _learn(self, state: TrainState, index: int, position: Any) -> TrainState:
        """Trains on a task, from `position` in its data if that is given, and lets the method conclude it."""
        parts = self.parts
        if position is None:
            if parts.method.individual and index > 0:
                with self._timed("setup"):
                    state = self._afresh(state)
            with self._timed("method"):
                prepared = parts.method.prepare(state.params, state.method_state, self._task(index, moment=0))
            state = parts.trainer.with_method_state(state, prepared)
        with self._timed("data"):
            stream = self._stream(index, state.method_state)
        total = self._steps(index, stream)
        if position is None:
            state = parts.trainer.start_task(state, total)
        rows = stream.train(self.config.seed + index, jax.process_index(), jax.process_count())
        feed = parts.trainer.feed(rows, prefetch=self.config.training.prefetch)
        if position is not None:
            feed.set_state(position)
        try:
            with self._timed("training"):
                state = train_task(
                    parts.trainer,
                    state,
                    feed,
                    total=total,
                    task=index,
                    name=self._name(index),
                    log_every=self.config.training.log_every,
                    sinks=self.sinks,
                    save=lambda state, data: self._save(state, task=index, phase="training", data=data),
                    save_every=self.config.training.checkpoint_every,
                    progress=self.main,
                )
        finally:
            rows.close()
        with self._timed("method"):
            state = self._conclude(state, index)
        self._note_task(index, total, stream)
        self._save(state, task=index, phase="learned", mark=f"after task {index}")
        return state

    def _afresh(self, state: TrainState) -> TrainState:
        """The state the run began with; only the count of steps goes on."""
        step = state.step
        # The old arrays go before the new ones come: there need not be room for both.
        jax.tree.map(lambda leaf: leaf.delete(), (state.params, state.opt_state, state.method_state))
        return self.parts.trainer.init(initial_params(self.parts)).replace(step=step)

    def _conclude(self, state: TrainState, index: int) -> TrainState:
        """Chooses the task's memory, lets the method consolidate, and stores what it wants beside the memory."""
        method, replay = self.parts.method, self.parts.method.replay
        if replay is not None and not method.joint:
            self.memory = self.memory.with_task(
                index,
                self._name(index),
                count=len(self.parts.train_rows[index]),
                fraction=replay.fraction,
                minimum=replay.minimum,
            )
            if self.main:
                self.memory.save(self.folder.memory)
        task = self._task(index, moment=1)
        new = method.consolidate(state.params, state.method_state, task)
        state = self.parts.trainer.with_method_state(state, new)
        records: list[tuple[int, dict[str, np.ndarray]]] = []

        def keep(examples: np.ndarray, batch: dict[str, np.ndarray]) -> None:
            for row, example in enumerate(examples):
                records.append((int(example), method.trim({name: value[row] for name, value in batch.items()})))

        if collect_signals(self.parts.trainer, state, task, keep):
            write_records(self._store(index, jax.process_index()), records)
        if self.main and (tables := method.tables(state.method_state)):
            write_tables(self.folder.importance, index, {name: np.asarray(value) for name, value in tables.items()})
        return state

    def _stream(self, index: int, method_state: Any) -> Stream:
        """The batches of a task, with those of the memory between them where there are any."""
        parts, replay = self.parts, self.parts.method.replay
        if parts.method.joint:
            return parts.pipeline(list(parts.train_rows))
        pipeline = parts.pipeline([parts.train_rows[index]])
        earlier = [task for task in self.memory.tasks if task.task < index and task.examples]
        if replay is None or not earlier:
            return pipeline
        stores = {task.task: store for task in earlier if (store := self._open_store(task.task)) is not None}
        collate = parts.method.collator(method_state) if stores else None
        memory = self._memory_pipeline([task.task for task in earlier], stores=stores or None, collate=collate)
        return Mixture(pipeline, memory, mode=replay.mode, every=replay.every)  # type: ignore[arg-type]

    def _memory_pipeline(self, tasks: list[int], **options: Any) -> MemoryPipeline:
        return MemoryPipeline(
            self.memory,
            dict(enumerate(self.parts.train_rows)),
            self.config.data,
            batch_size=self.config.training.batch_size,
            shapes=self.parts.shapes,
            tasks=tasks,
            **options,
        )

    def _task(self, index: int, moment: int) -> RunningTask:
        """The task as the method sees it before (`moment` 0) or after (1) training on it."""
        parts = self.parts
        remembered = any(task.task == index and task.examples for task in self.memory.tasks)
        sources = list(parts.train_rows) if parts.method.joint else [parts.train_rows[index]]
        return RunningTask(
            index=index,
            name=self._name(index),
            count=self.phases,
            key=jax.random.fold_in(jax.random.key(self.config.seed), 2 * index + moment),
            seed=self.config.seed + index,
            pipeline=ProcessShare(parts.pipeline(sources)),
            memory=ProcessShare(self._memory_pipeline([index])) if remembered else None,
            params_before=lambda: self._params_before(index),
            compiler=parts.trainer.compile,
        )

    def _params_before(self, index: int) -> Any:
        if self.parts.method.individual:
            return initial_params(self.parts)
        mark = "before the first task" if index == 0 else f"after task {index - 1}"
        saved = self.checkpoints.find(mark)
        if saved is None:
            raise UserError(f"checkpoints {self.folder.checkpoints}: the one {mark} is gone; the run cannot go on")
        return self.checkpoints.params(self.parts.trainer.target.params, saved)

    def _steps(self, index: int, stream: Stream) -> int:
        """Optimizer steps of a task; joint training gets as many as all tasks together."""
        training, count = self.config.training, len(self.parts.tasks)
        if not self.parts.method.joint:
            return task_steps(training, index, count, stream.steps_per_epoch)
        if training.steps is not None:
            return sum(task_steps(training, task, count, 1) for task in range(count))
        parts = [self.parts.pipeline([rows]).steps_per_epoch for rows in self.parts.train_rows]
        return sum(task_steps(training, task, count, steps) for task, steps in enumerate(parts))

    def _name(self, index: int) -> str:
        return "all tasks" if self.parts.method.joint else self.parts.tasks[index].name

    def _store(self, index: int, process: int) -> Path:
        return self.folder.teacher / f"task{index:02d}_process{process:03d}.array_record"

    def _open_store(self, index: int) -> TeacherStore | None:
        paths = sorted(self.folder.teacher.glob(f"task{index:02d}_process*.array_record"))
        return TeacherStore.open(paths) if paths else None

    # Evaluation and results

    def _evaluate(self, state: TrainState, after: int) -> None:
        """Scores the tasks due after `after` and writes the results, unless they are there already."""
        matrix = self.results.continual_matrix()
        done = len(matrix.rows()) > after if after >= 0 else self.results.initial is not None
        if done:
            return
        further = {name: part.model_dump() for name, part in self.results.further.items()}
        if self.parts.method.individual and after > 0:
            matrix = matrix.carry()
            further = {name: self._measured(self._matrix(part).carry(), name) for name, part in further.items()}
        with self._timed("evaluation"):
            for index in scored_tasks(self.parts, after):
                evaluation = self.evaluator.score(answering_params(self.parts, state, index), index)
                matrix = matrix.record(after, index, evaluation.score)
                for name, value in evaluation.further.items():
                    further[name] = self._add(further.get(name), name, after, index, value)
                if self.main and evaluation.rows:
                    write_predictions(
                        self.folder.predictions, after, index, self.parts.tasks[index].name, evaluation.rows
                    )
        self.results = self.results.model_copy(
            update={
                **measure(matrix, self.evaluator.metrics),
                "further": {name: Measure(**part) for name, part in further.items()},
            }
        )
        self._write_results()

    def _add(self, part: dict[str, Any] | None, name: str, after: int, index: int, value: float) -> dict[str, Any]:
        if part is None:
            higher = [name != "perplexity"] * len(self.parts.tasks)
            # Rows without a score: a measure that tasks before this one do not have.
            empty = ContinualMatrix.from_lists([()] * max(after, 0), None, higher, joint=self.results.joint)
            return self._measured(empty.record(after, index, value), name)
        return self._measured(self._matrix(part).record(after, index, value), name)

    def _matrix(self, part: dict[str, Any]) -> ContinualMatrix:
        measured = Measure(**part)
        return ContinualMatrix.from_lists(
            measured.matrix, measured.initial, measured.higher_is_better, joint=self.results.joint
        )

    def _measured(self, matrix: ContinualMatrix, name: str) -> dict[str, Any]:
        return measure(matrix, [name] * matrix.num_tasks)

    def _read_results(self) -> Results:
        if self.folder.results.is_file():
            return Results.read(self.folder.results)
        joint = self.parts.method.joint
        matrix = ContinualMatrix.empty(len(self.parts.tasks), self.evaluator.higher_is_better, joint=joint)
        sizes = (math.prod(leaf.shape) for leaf in jax.tree.leaves(self.parts.network.shapes()))
        return Results(
            **measure(matrix, self.evaluator.metrics),
            method=self.config.method.name,
            seed=self.config.seed,
            tasks=[task.name for task in self.parts.tasks],
            joint=joint,
            seconds=0.0,
            parameters=sum(sizes),
            device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            versions=installed_versions(),
        )

    def _note_task(self, index: int, steps: int, stream: Stream) -> None:
        self.results = self.results.model_copy(
            update={
                "steps": [*self.results.steps[:index], steps],
                "data": {**self.results.data, self._name(index): stream.describe()},
                "stored_bytes": sum(path.stat().st_size for path in self.folder.teacher.glob("*.array_record")),
            }
        )

    def _write_results(self, *, finished: bool = False) -> None:
        timing = {name: round(seconds, 3) for name, seconds in self.timing.items()}
        self.results = self.results.model_copy(
            update={"timing": timing, "seconds": round(sum(timing.values()), 3), "finished": finished}
        )
        if self.main:
            self.results.write(self.folder.results)

    # Keeping

    def _save(self, state: TrainState, *, task: int, phase: str, data: Any = None, mark: str | None = None) -> None:
        with self._timed("checkpoints"):
            progress = {"task": task, "phase": phase, "timing": self.timing}
            self.checkpoints.save(state, progress=progress, data=data, mark=mark)

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Adds the seconds of a block to the run's time by part; a block within it counts as its own part only."""
        started, inner = time.monotonic(), sum(self.timing.values())
        try:
            yield
        finally:
            inner = sum(self.timing.values()) - inner
            self.timing[part] = self.timing.get(part, 0.0) + time.monotonic() - started - inner
