"""A run: one model learns a sequence of tasks and is evaluated after each; resumable at any point."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl.config import ExperimentConfig
from jaxcl.data.memory import Memory, TaskMemory
from jaxcl.data.mix import Interleaved, Mixed, WithGeneral, general_share
from jaxcl.data.pipeline import Pipeline, Stream
from jaxcl.data.teacher_store import TeacherStore, write_records
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results, write_tables
from jaxcl.methods.registry import find_method
from jaxcl.reporting.report import write_report
from jaxcl.run.components import Components, build, initial_params
from jaxcl.run.evaluator import answering_params
from jaxcl.run.fingerprints import load_memory, memory_prints, take_fingerprints
from jaxcl.run.folder import RunFolder
from jaxcl.run.scoreboard import Scoreboard
from jaxcl.run.synthesis import Writer, write_samples
from jaxcl.run.tasks import Stage, memory_pipeline, remember, running_task
from jaxcl.sharding.processes import initialize, on_first, wait_for_all
from jaxcl.training.checkpoint import START_MARK, Checkpoints, Saved, mark_after
from jaxcl.training.compile import enable_compilation_cache
from jaxcl.training.config import task_steps
from jaxcl.training.keys import run_key
from jaxcl.training.loop import train_task
from jaxcl.training.privacy import spent
from jaxcl.training.profile import Profiler
from jaxcl.training.sinks import Sink, check_sinks, open_sinks
from jaxcl.training.state import TrainState
from jaxcl.training.stored import Collate
from jaxcl.training.task import RunningTask, signal_records

# Seconds that a file may take to become visible on another machine.
_VISIBLE_SECONDS = 30


class Outcome(NamedTuple):
    """Results and report of a run."""

    results: Results
    report: Path


def run(config: ExperimentConfig, *, grown_from: ExperimentConfig | None = None) -> Outcome:
    """Trains through the sequence of tasks and evaluates after each.

    If the run folder contains an interrupted run of the same configuration, it is resumed; the results of a finished
    run are returned.

    Args:
      config: the configuration.
      grown_from: the configuration of the run in the folder, if `config` has more tasks at the end: the run continues
        with these.

    Returns:
      The results, and the path of the report.

    Raises:
      UserError: the configuration or something it refers to cannot be used; what was saved before is intact.
      KeyboardInterrupt: interrupted; a checkpoint was saved.
    """
    initialize()
    _keep_compiled_programs()
    folder = RunFolder(Path(config.output))
    on_first(lambda: check_sinks(config.training.sinks))
    try:
        on_first(lambda: folder.claim((grown_from or config).plain()))
        _check_shared(folder)
        names = [task.name for task in config.tasks]
        moved = folder.content().get("data_root") != config.data_root  # then the data is compared even at the end
        if not moved and folder.results.is_file():
            results = Results.read(folder.results)
            if results.finished and results.tasks == names and _at_the_end(folder, config):
                return Outcome(results, _report(folder))
        parts = build(config, folder)
        keep = config.training.keep, config.training.keep_tasks
        with Checkpoints(folder.checkpoints, keep=keep[0], keep_marked=keep[1]) as checkpoints:
            sequence = TaskSequence(parts, folder, checkpoints)
            sequence.board.evaluator.check()
            if grown_from is not None:
                sequence.check_finished(grown_from)
            if grown_from is not None:
                # Only after the new task has been checked.
                on_first(lambda: folder.describe(config.plain()))
            results = sequence.run()
        return Outcome(results, _report(folder))
    finally:
        folder.release()


def _check_shared(folder: RunFolder) -> None:
    """Checks that this process sees the files of process 0: all read checkpoints, memory and teacher store."""
    for _ in range(_VISIBLE_SECONDS):
        if folder.is_run:
            return
        time.sleep(1.0)  # network file systems may be slow
    raise UserError(
        f"output {folder.path}: process {jax.process_index()} does not see what process 0 wrote there; "
        "choose a folder on storage that all processes share"
    )


def _at_the_end(folder: RunFolder, config: ExperimentConfig) -> bool:
    """Whether the newest checkpoint is that after the last task; also if all checkpoints were removed since."""
    if not folder.checkpoints.is_dir():
        return True
    last = 0 if find_method(config.method.name).joint else len(config.tasks) - 1
    with Checkpoints.reading(folder.checkpoints) as checkpoints:
        notes = checkpoints.notes()
    return not notes or (notes[-1].progress["task"], notes[-1].progress["phase"]) == (last, "learned")


def _report(folder: RunFolder) -> Path:
    on_first(lambda: write_report(folder.path))
    return folder.report


def _keep_compiled_programs() -> None:
    """Caches compiled programs for later runs in the user's cache folder, unless jax has another one configured."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxcl"
        with contextlib.suppress(UserError):  # without a writable home, programs are compiled again
            enable_compilation_cache(cache)


class TaskSequence:
    """One run through the tasks. The run folder contains all that is needed to resume it."""

    def __init__(self, parts: Components, folder: RunFolder, checkpoints: Checkpoints) -> None:
        self.parts = parts
        self.config = parts.config
        self.folder = folder
        self.checkpoints = checkpoints
        self.saved = checkpoints.latest_whole()
        self.fingerprints = take_fingerprints(parts, self.saved)
        self.memory = load_memory(folder.memory, self.config.seed, self.saved)
        self.board = Scoreboard(parts, folder, None if self.saved is None else self.saved.progress.get("results"))
        self.main = jax.process_index() == 0
        self.sinks: list[Sink] = []
        self.profiler = Profiler(folder.tensorboard, self.config.training.profile if self.main else None)
        self.timing: dict[str, float] = dict(self.board.results.timing)

    def check_finished(self, config: ExperimentConfig) -> None:
        """Checks that the checkpoint is that after the last task of a configuration.

        Raises:
          UserError: it is not; the run can be finished first.
        """
        note = {} if self.saved is None else self.saved.progress
        if (note.get("task"), note.get("phase")) != (len(config.tasks) - 1, "learned"):
            raise UserError(
                f"{self.folder.path}: the run is not finished; finish it first: jaxcl run {self.folder.config_file}"
            )

    def run(self) -> Results:
        """Trains and evaluates from the last checkpoint to the end."""
        saved = self.saved
        if saved is None:
            with self._timed("setup"):
                state = self.parts.trainer.init(initial_params(self.parts))
            self._save(state, task=-1, phase="learned", mark=START_MARK)
            position = None
        else:
            self.timing = dict(saved.progress["timing"])
            if self.board.results.initial is not None and self.board.missing(-1):
                # Tasks were added since: the initial model is scored on them, too.
                self._evaluate(self.parts.trainer.init(initial_params(self.parts)), -1)
            state, position = self._restore(saved)
        if self.main:
            self.sinks = open_sinks(
                self.folder.path, self.config.training.sinks, config=self.config.plain(), after=int(state.step)
            )
        finished = False
        try:
            results = self._continue(state, position, saved)
            finished = True
            return results
        finally:
            for sink in self.sinks:
                sink.close(finished=finished)

    def _restore(self, saved: Saved) -> tuple[TrainState, Any]:
        """A checkpoint's state and position in the data; the state is extended to tasks that were added since."""
        trainer, tasks = self.parts.trainer, len(self.parts.tasks)
        known = saved.progress.get("tasks", tasks)
        if known == tasks:
            return self.checkpoints.restore(trainer.target, saved)
        state, position = self.checkpoints.restore(trainer.target_of(known), saved)
        return trainer.grow(state), position

    def _continue(self, state: TrainState, position: Any, saved: Saved | None) -> Results:
        task, phase = (-1, "learned") if saved is None else (saved.progress["task"], saved.progress["phase"])
        if phase == "learned":
            self._evaluate(state, task)
            task, position = task + 1, None
        for index in range(task, self.parts.phases):
            state = self._learn(state, index, position)
            position = None
            self._evaluate(state, index)
        self.checkpoints.wait()  # finished only when the model is on disk
        self.board.write(self.timing, finished=True)
        return self.board.results

    # Learning one task

    def _learn(self, state: TrainState, index: int, position: Any) -> TrainState:
        """Trains on a task, from `position` in its data if given, and lets the method consolidate it."""
        parts = self.parts
        if position is None:
            if parts.method.individual and index > 0:
                with self._timed("setup"):
                    state = self._restart(state)
            with self._timed("method"):
                prepared = parts.method.prepare(state.params, state.method_state, self._task(index, stage="before"))
            state = parts.trainer.with_method_state(state, prepared)
        with self._timed("data"):
            stream = self._stream(index)
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
                    name=self.parts.phase_name(index),
                    log_every=self.config.training.log_every,
                    sinks=self.sinks,
                    save=lambda state, data: self._save(state, task=index, phase="training", data=data),
                    save_every=self.config.training.checkpoint_every,
                    progress=self.main,
                    profiler=self.profiler,
                )
        finally:
            rows.close()
        with self._timed("method"):
            state = self._conclude(state, index)
        self.board.note_task(index, steps=total, described=stream.describe())
        if (privacy := self.config.training.privacy) is not None:
            # General rows are public; the steps on them tell nothing about the task's.
            steps = stream.own_steps_in(total)
            epoch = stream.own_steps_per_epoch
            self.board.note_privacy(index, spent(privacy, steps=steps, steps_per_epoch=epoch))
        self._save(state, task=index, phase="learned", mark=mark_after(index))
        return state

    def _restart(self, state: TrainState) -> TrainState:
        """The initial state of the run, except that the count of steps continues."""
        step = state.step
        # The old arrays are deleted before the new ones are created, so that memory never holds both.
        jax.tree.map(lambda leaf: leaf.delete(), (state.params, state.opt_state, state.method_state, state.low_bits))
        return self.parts.trainer.init(initial_params(self.parts)).replace(step=step)

    def _conclude(self, state: TrainState, index: int) -> TrainState:
        """Draws the task's memory, lets the method consolidate, and stores its signals for the memory."""
        parts, method = self.parts, self.parts.method
        self.memory = self._remember(state, index)
        if self.main and self.memory.tasks:
            self.memory.save(self.folder.memory)
        task = self._task(index, stage="after")
        new = method.consolidate(state.params, state.method_state, task)
        state = parts.trainer.with_method_state(state, new)
        state = parts.trainer.with_params(state, method.final_params(state.params, state.method_state, task))
        on_first(lambda: self._remove_stores(index))
        records = signal_records(parts.trainer, state, task)
        if (first := next(records, None)) is not None:
            stored = itertools.chain([first], records)
            about = parts.about(self._memory_of(index))
            write_records(self.folder.store(index, jax.process_index()), stored, about)
        wait_for_all(f"signals of task {index} stored")
        if self.main and (tables := method.tables(state.method_state)):
            write_tables(self.folder.importance, index, {name: np.asarray(value) for name, value in tables.items()})
        return state

    def _remember(self, state: TrainState, index: int) -> Memory:
        replay = self.parts.method.replay
        if replay is None or replay.source == "kept":
            return remember(self.parts, self.memory, index)
        key = jax.random.fold_in(run_key(self.config.seed, "samples"), index)
        begun = replay.synthetic.writer == "start"
        opened_by = initial_params(self.parts) if begun else self._params_before(index)
        rows, dropped = write_samples(Writer(self.parts, index, opened_by, state.params), key)
        return self.memory.with_written(index, self.parts.phase_name(index), rows, dropped)

    def _stream(self, index: int) -> Stream:
        """The batches of a task, mixed with those of the memory and with general ones if there are any."""
        parts, settings = self.parts, self.config.data.general
        own = parts.training_pipeline(index)
        if settings is None:
            return self._with_memory(index, own, 0)
        general = parts.pipeline([parts.general_rows(index)], origin="general")
        share = general_share(settings.share, settings.by, own, general)
        return WithGeneral(self._with_memory(index, own, share), general, share)

    def _with_memory(self, index: int, pipeline: Pipeline, general: Fraction | int) -> Stream:
        """A task's batches, mixed with those of the memory if there is one; a share of all will be general ones."""
        parts, replay = self.parts, self.parts.method.replay
        if parts.method.joint:
            return pipeline
        earlier = [task for task in self.memory.tasks if task.task < index and task.examples]
        if replay is None or not earlier:
            return pipeline
        stores = {task.task: store for task in earlier if (store := self._open_store(task.task)) is not None}
        collate = (
            Collate(parts.method, parts.trainer.target.params, parts.trainer.target.method_state) if stores else None
        )
        tasks = [task.task for task in earlier]
        memory = memory_pipeline(parts, self.memory, tasks, stores=stores or None, collate=collate)
        if replay.mode == "mix":
            return Mixed(pipeline, memory)
        # With a fixed number of steps, the first memory step comes no later than the last one.
        batches = task_steps(self.config.training, index, len(parts.tasks), pipeline.steps_per_epoch)
        latest = batches if self.config.training.steps is None else math.floor(batches * (1 - general)) - 1
        return Interleaved(pipeline, memory, every=replay.every, latest=latest)

    def _task(self, index: int, stage: Stage) -> RunningTask:
        """The task as the method sees it before or after training on it."""
        params_before = partial(self._params_before, index)
        return running_task(self.parts, self.memory, index, stage=stage, params_before=params_before)

    def _params_before(self, index: int) -> Any:
        if self.parts.method.individual:
            return initial_params(self.parts)
        mark = START_MARK if index == 0 else mark_after(index - 1)
        saved = self.checkpoints.find(mark)
        if saved is None:
            raise UserError(
                f"checkpoints {self.folder.checkpoints}: the one {mark} is missing; the run cannot be resumed"
            )
        return self.checkpoints.params(self.parts.trainer.target.params, saved)

    def _steps(self, index: int, stream: Stream) -> int:
        """Optimizer steps of a task; for joint training, those of all tasks together."""
        training, count = self.config.training, len(self.parts.tasks)
        if not self.parts.method.joint:
            steps = task_steps(training, index, count, stream.own_steps_per_epoch)
            return steps if training.steps is not None else stream.steps_for(steps)
        if training.steps is not None:
            return sum(task_steps(training, task, count, 1) for task in range(count))
        parts = [self.parts.pipeline([rows]).steps_per_epoch for rows in self.parts.learned_rows.values()]
        return stream.steps_for(sum(task_steps(training, task, count, steps) for task, steps in enumerate(parts)))

    def _remove_stores(self, index: int) -> None:
        """Removes the files of an interrupted attempt, which may have had more processes."""
        for path in self.folder.stores(index):
            path.unlink()

    def _open_store(self, index: int) -> TeacherStore | None:
        paths = self.folder.stores(index)
        return TeacherStore.open(paths, self.parts.about(self._memory_of(index))) if paths else None

    def _memory_of(self, index: int) -> TaskMemory:
        return next(task for task in self.memory.tasks if task.task == index)

    # Evaluation and results

    def _evaluate(self, state: TrainState, after: int) -> None:
        """Scores the tasks due after `after` and writes the results."""
        with self._timed("evaluation"):
            self.board.evaluate(lambda index: answering_params(self.parts, state, index), after)
        self.board.write(self.timing)
        if row := self.board.row(after):
            for sink in self.sinks[1:]:  # not metrics.jsonl: results.json holds the scores
                sink.write({"step": int(state.step), "task": after, "kind": "score", **row})

    # Checkpoints and timing

    def _save(self, state: TrainState, *, task: int, phase: str, data: Any = None, mark: str | None = None) -> None:
        with self._timed("checkpoints"):
            progress = {
                "task": task,
                "phase": phase,
                "tasks": len(self.parts.tasks),
                "timing": self.timing,
                "fingerprints": self.fingerprints,
                "memory": memory_prints(self.memory),
                "results": self.board.results.plain(),
            }
            self.checkpoints.save(state, progress=progress, data=data, mark=mark)

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Adds the seconds of a block to the timing of its part; nested blocks count only for their own parts."""
        started, inner = time.monotonic(), sum(self.timing.values())
        try:
            yield
        finally:
            inner = sum(self.timing.values()) - inner
            self.timing[part] = self.timing.get(part, 0.0) + time.monotonic() - started - inner
