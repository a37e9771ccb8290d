"""A run: one model learns a sequence of tasks and is evaluated after each; resumable at any point."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcl.config import ExperimentConfig
from jaxcl.config.file import read_yaml
from jaxcl.data.formats.storage import file_system, is_url
from jaxcl.data.pipeline import Stream
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.reporting.goodput import goodput
from jaxcl.reporting.report import write_report
from jaxcl.run.components import Components, build, initial_params
from jaxcl.run.consolidation import Consolidation
from jaxcl.run.ending import finished_results
from jaxcl.run.evaluator import answering_params
from jaxcl.run.fingerprints import memory_prints, take_fingerprints
from jaxcl.run.folder import RunFolder
from jaxcl.run.halfway import halfway_loops
from jaxcl.run.missing import say_missing_predictions, say_missing_rows
from jaxcl.run.not_finite import write_not_finite
from jaxcl.run.note import FORMAT, Note, note_of
from jaxcl.run.remembering import load_kept
from jaxcl.run.remote.reading import local_folder
from jaxcl.run.remote.uploads import Uploads
from jaxcl.run.rewinding import check_goes_back, may_go_back, noted_after, noted_watch, order_seed, spent_on, watch_of
from jaxcl.run.scoreboard import Scoreboard
from jaxcl.run.shared_folder import check_shared
from jaxcl.run.stopwatch import Stopwatch
from jaxcl.run.stores import check_stores
from jaxcl.run.streams import task_stream, total_steps
from jaxcl.run.trunk import check_phases, starts_anew
from jaxcl.sharding.processes import initialize, of_all_processes, on_first
from jaxcl.training.checkpoint import Checkpoints, Saved
from jaxcl.training.compile import enable_compilation_cache, programs_folder
from jaxcl.training.kept import START_MARK, mark_after, mark_before_decay
from jaxcl.training.loop import train_task
from jaxcl.training.loops import Loops
from jaxcl.training.profile import Profiler
from jaxcl.training.sinks import METRICS, JsonLines, Sink, check_sinks, open_sinks, seconds_after
from jaxcl.training.state import TrainState
from jaxcl.training.watch import NotFinite, Watch


class Outcome(NamedTuple):
    """Results and report of a run."""

    results: Results
    report: Path


def run(config: ExperimentConfig, *, grown_from: ExperimentConfig | None = None, data_changed: bool = False) -> Outcome:
    """Trains through the sequence of tasks and evaluates after each.

    If the run folder contains an interrupted run of the same configuration, it is resumed; the results of a finished
    run are returned.

    Args:
      config: the configuration.
      grown_from: the configuration of the run in the folder, if `config` has more tasks at the end: the run continues
        with these.
      data_changed: go on even if the data is not that which the run began with; what changed is said.

    Returns:
      The results, and the path of the report.

    Raises:
      UserError: the configuration or something it refers to cannot be used; what was saved before is intact.
      KeyboardInterrupt: interrupted; a checkpoint was saved.
    """
    if config.federated is not None:
        raise UserError("federated: this configuration is for several clients; train it by jaxcl federate", exit_code=2)
    initialize()
    started = time.monotonic()
    _keep_compiled_programs()
    remote = is_url(config.output)
    folder = RunFolder(local_folder(config.output, config.local_output) if remote else Path(config.output))
    on_first(lambda: check_sinks(config.training.sinks))
    try:
        with Uploads() as uploads:
            if remote:
                on_first(lambda: file_system(config.output))  # whether its driver is installed, before anything is made
                on_first(folder.lock)
                on_first(lambda: uploads.open(config.output, folder.path))
            on_first(lambda: folder.claim((grown_from or config).plain()))
            check_shared(folder, config.output)
            outcome = _run(config, folder, uploads, started, grown_from=grown_from, data_changed=data_changed)
            on_first(uploads.finish)
            return outcome
    finally:
        folder.release()


def _run(
    config: ExperimentConfig,
    folder: RunFolder,
    uploads: Uploads,
    started: float,
    *,
    grown_from: ExperimentConfig | None,
    data_changed: bool,
) -> Outcome:
    """The run in a folder that it has claimed."""
    # Of data at another place the content is compared, even at the end; a process may have a copy of its own.
    moved = of_all_processes(np.array(read_yaml(folder.config_file).get("data_root") != config.data_root)).any()
    if not moved and (found := finished_results(folder, config)) is not None:
        return Outcome(found, _report(folder))
    parts = build(config, folder)
    keep = config.training.keep, config.training.keep_tasks
    with Checkpoints(folder.checkpoints, keep=keep[0], keep_marked=keep[1]) as checkpoints:
        sequence = TaskSequence(parts, folder, checkpoints, uploads, data_changed=data_changed)
        sequence.board.evaluator.check()
        sequence.check_schedule()
        sequence.check_marks()
        if grown_from is not None:
            sequence.check_finished(grown_from)
            # Only after the new task has been checked.
            on_first(lambda: folder.describe(config.plain()))
        sequence.stopwatch.add("startup", time.monotonic() - started)
        results = sequence.run()
    return Outcome(results, _report(folder))


def _report(folder: RunFolder) -> Path:
    on_first(lambda: write_report(folder.path))
    return folder.report


def _keep_compiled_programs() -> None:
    """Caches compiled programs for later runs in the user's cache folder, unless jax has another one configured."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(UserError):  # without a writable home, programs are compiled again
            enable_compilation_cache(programs_folder())


class TaskSequence(Consolidation):
    """One run through the tasks. The run folder contains all that is needed to resume it."""

    def __init__(
        self,
        parts: Components,
        folder: RunFolder,
        checkpoints: Checkpoints,
        uploads: Uploads | None = None,
        *,
        data_changed: bool = False,
    ) -> None:
        self.parts = parts
        self.config = parts.config
        self.folder = folder
        self.checkpoints = checkpoints
        self.uploads = uploads or Uploads()
        self.saved = checkpoints.latest_whole()
        self.note = None if self.saved is None else note_of(self.saved)
        self.fingerprints = take_fingerprints(parts, self.saved, data_changed=data_changed)
        self.kept = load_kept(folder, self.config.seed, self.saved)
        self.stores = check_stores(folder, self.saved)
        self.board = Scoreboard(parts, folder, None if self.note is None else self.note.results)
        self.main = jax.process_index() == 0
        self.sinks: list[Sink] = []
        self.profiler = Profiler(folder.tensorboard, self.config.training.profile if self.main else None)
        self.stopwatch = Stopwatch()
        self.loops = Loops()
        self._saved_step = -1  # of the run, of the checkpoint that was saved or restored last

    def check_finished(self, config: ExperimentConfig) -> None:
        """Checks that the checkpoint is that after the last task of a configuration.

        Raises:
          UserError: it is not; the run can be finished first.
        """
        note = self.note
        if note is None or (note.task, note.phase) != (len(config.tasks) - 1, "learned"):
            raise UserError(
                f"{self.folder.path}: the run is not finished; finish it first: jaxcl run {self.folder.config_file}"
            )

    def check_schedule(self) -> None:
        """Checks before training that the phases of the schedule fit into every task that is still to be learned."""
        start = 0 if self.note is None else self.note.task + (self.note.phase == "learned")
        check_phases(self.parts, start, partial(total_steps, self.parts))

    def check_marks(self) -> None:
        """Checks before training that the checkpoint which the task's method will ask for is there, and whole."""
        if self.note is not None and self.note.phase != "learned" and self._asks_for_before:
            self._saved_before(self.note.task)

    def run(self) -> Results:
        """Trains and evaluates from the last checkpoint to the end."""
        saved = self.saved
        self.loops = self.board.evaluator.loops = halfway_loops(
            self.parts, self.folder, self.checkpoints, self.uploads, saved, self.fingerprints
        )
        with self._timed("data"):
            self.parts.encode_all()
        if saved is None:
            with self._timed("setup"):
                state = self.parts.trainer.init(initial_params(self.parts))
            self._save(state, task=-1, phase="learned", mark=START_MARK)
            position = None
        else:
            self.stopwatch.resume(note_of(saved).timing)
            if self.board.results.initial is not None and self.board.missing(-1):
                # Tasks were added since: the initial model is scored on them, too.
                self._evaluate(self.parts.trainer.init(initial_params(self.parts)), -1)
            with self._timed("recovery"):
                state, position = self._restore(saved)
            self.stopwatch.add("lost", self._seconds_after(state))
        self._open_sinks(int(state.step))
        self._note_attempt(int(state.step))
        finished = False
        try:
            results = self._continue(state, position, self.note)
            finished = True
            return results
        finally:
            for sink in self.sinks:
                sink.close(finished=finished)

    def _open_sinks(self, after: int) -> None:
        """Opens the sinks behind the rows up to a step of the run; later rows are removed."""
        for sink in self.sinks:
            sink.close(finished=False)
        if self.main:
            self.sinks = open_sinks(
                self.folder.path, self.config.training.sinks, config=self.config.plain(), after=after
            )

    def _note_attempt(self, step: int) -> None:
        """Records that the run begins, or goes on after a step; process 0 says what is gone of its folder since."""
        self.board.note_attempt(step)
        if self.main:
            self.folder.not_finite.unlink(missing_ok=True)  # of the attempt before
        if self.note is not None and self.main:
            found, expected = self.logged_steps, self.note.logged_steps
            if found is not None and expected is not None:
                say_missing_rows(self.folder.metrics, found, expected, "logged steps")
            say_missing_predictions(self.parts, self.folder, self.board.results)

    @property
    def logged_steps(self) -> int | None:
        """Steps that `metrics.jsonl` has rows of; `None` where none is open."""
        return next((sink.steps for sink in self.sinks if isinstance(sink, JsonLines)), None)

    def _restore(self, saved: Saved) -> tuple[TrainState, Any]:
        """A checkpoint's state and position in the data; the state is extended to tasks that were added since."""
        trainer, tasks = self.parts.trainer, len(self.parts.tasks)
        known = note_of(saved).tasks or tasks
        target = trainer.target if known == tasks else trainer.target_of(known)
        state, position = self.checkpoints.restore(target, saved)
        self._saved_step = int(state.step)
        return state if known == tasks else trainer.grow(state), position

    def _continue(self, state: TrainState, position: Any, note: Note | None) -> Results:
        task, begun = (-1, False) if note is None else (note.task, note.phase != "learned")
        if not begun:
            self._evaluate(state, task)
            task, position = task + 1, None
        for index in range(task, self.parts.phases):
            state = self._learn(state, index, position, begun=begun)
            position, begun = None, False
            self._evaluate(state, index)
        # Methods with a model per task have only the last one here.
        if self.config.evaluation.dev and not self.parts.method.individual:
            with self._timed("evaluation"):
                self.board.evaluate_dev(
                    lambda index: answering_params(self.parts, state, index),
                    scored=lambda: self.board.write(self.stopwatch.seconds),
                )
        self.checkpoints.wait()  # finished only when the model is on disk
        self._forget_unneeded()
        self.board.write(self.stopwatch.seconds, finished=True)
        return self.board.results

    # Learning one task

    def _learn(self, state: TrainState, index: int, position: Any, *, begun: bool) -> TrainState:
        """Trains on a task and lets the method consolidate it.

        Args:
          state: the state before the task, or within it.
          index: the task.
          position: in its data, within the task.
          begun: whether the state lies within the task, or at its last step.
        """
        parts, training = self.parts, self.config.training
        noted = noted_watch(self.note) if begun and self.note is not None else None
        while True:
            if not begun:
                state = self._prepare(state, index)
            with self._timed("data"):
                stored = bool(self.board.results.stored_bytes)
                stream = task_stream(parts, self.folder, self.kept, index, stored=stored)
            total = total_steps(parts, index, stream)
            if not begun:
                state = parts.trainer.start_task(state, total, first=starts_anew(parts, index))
            watch = watch_of(training, total, noted)
            if begun and int(state.clock.step) == total:
                break
            try:
                state = self._train(state, index, stream, total, position, watch)
                break
            except NotFinite as error:
                if not may_go_back(training, watch):
                    raise self._stopped(index, stream, watch, error) from None
                state, position, noted = self._go_back(index, watch, error)
                begun = position is not None
        if self._concludes and int(state.step) != self._saved_step:
            self._save(state, task=index, phase="trained", watch=watch)
        # Once all is done that can be stopped, the checkpoint is saved in any case.
        with self.loops.phase(f"after {index}"):
            with self._timed("method"):
                state = self._conclude(parts.trainer.finish_task(state), index)
            self.board.note_task(index, steps=total, described=stream.describe(), watch=watch)
            if training.privacy is not None:
                self.board.note_privacy(index, spent_on(training.privacy, stream, total, watch))
            self._save(state, task=index, phase="learned", mark=mark_after(index))
        return state

    def _train(
        self, state: TrainState, index: int, stream: Stream, total: int, position: Any, watch: Watch
    ) -> TrainState:
        """Trains to the end of a task, from `position` in its data if given."""
        parts, training = self.parts, self.config.training
        seed = order_seed(self.config.seed + index, len(watch.left))
        rows = stream.train(seed, jax.process_index(), jax.process_count())
        feed = parts.trainer.feed(rows, prefetch=training.prefetch)
        if position is not None:
            feed.set_state(position)
        branch = None if parts.method.individual or parts.method.joint else state.clock.decay_start
        try:
            with self._timed("training"):
                return train_task(
                    parts.trainer,
                    state,
                    feed,
                    total=total,
                    task=index,
                    name=parts.phase_name(index),
                    log_every=training.log_every,
                    sinks=self.sinks,
                    save=lambda state, data: self._save(
                        state,
                        task=index,
                        phase="training",
                        data=data,
                        mark=mark_before_decay(index) if int(state.clock.step) == branch else None,
                        watch=watch,
                    ),
                    save_every=training.checkpoint_every,
                    save_at=branch,
                    progress=self.main,
                    profiler=self.profiler,
                    watch=watch,
                )
        finally:
            rows.close()

    def _go_back(self, index: int, watch: Watch, error: NotFinite) -> tuple[TrainState, Any, dict[str, Any]]:
        """State, position and counts of the last checkpoint, as if the run were resumed there, but for the order.

        All processes have read the same metrics, so all come here, for the same step.
        """
        saved = self.checkpoints.latest_whole()
        assert saved is not None  # there is one from before the first task
        check_goes_back(saved, index, error)
        with self._timed("recovery"):
            state, position = self._restore(saved)
        self.stopwatch.lose(self._seconds_after(state))
        step = 0 if position is None else int(state.clock.step)
        if self.main:
            where = f"step {step} of it (checkpoint {saved.number})"
            print(f"{error}; going on from {where} with another order of the data", file=sys.stderr)
        self._open_sinks(int(state.step))
        return state, position, noted_after(watch, saved, step=step, left=error.step)

    def _stopped(self, index: int, stream: Stream, watch: Watch, error: NotFinite) -> NotFinite:
        """Writes the report of a run that stops for its numbers; returns the error that ends it."""

        def write() -> None:
            path, names = self.folder.not_finite, self.parts.names
            name, seed = self.parts.phase_name(index), self.config.seed + index
            write_not_finite(path, error, watch, stream, task=name, names=names, seed=seed)
            self.board.write(self.stopwatch.seconds)
            write_report(self.folder.path)

        try:
            on_first(write)
        except UserError as failed:  # why the run stops matters more
            return NotFinite(f"{error}; without a report: {failed}", error.step)
        self.checkpoints.wait()  # what is uploaded is whole
        self.uploads.stage()
        self.uploads.submit(None)
        return NotFinite(f"{error}; see {self.folder.report}", error.step)

    # Evaluation and results

    def _evaluate(self, state: TrainState, after: int) -> None:
        """Scores the tasks due after `after` and writes the results."""
        with self._timed("evaluation"):
            self.board.evaluate(
                lambda index: answering_params(self.parts, state, index),
                after,
                scored=lambda: self.board.write(self.stopwatch.seconds),
            )
        seconds = self.stopwatch.seconds
        self.board.write(seconds)
        times = {"goodput": goodput(seconds) or 0.0, **{f"seconds_{name}": one for name, one in seconds.items()}}
        for kind, row in (("score", self.board.row(after)), ("time", times)):
            for sink in self.sinks[1:]:  # not metrics.jsonl: results.json holds both
                if row:
                    sink.write({"step": int(state.step), "task": after, "kind": kind, **row})

    # Checkpoints and timing

    def _save(
        self,
        state: TrainState,
        *,
        task: int,
        phase: str,
        data: Any = None,
        mark: str | None = None,
        watch: Watch | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> int:
        """Saves a state, with `more` in the note of the run's progress; returns the number of the checkpoint."""
        with self._timed("checkpoints"):
            progress = {
                "format": FORMAT,
                "task": task,
                "phase": phase,
                "tasks": len(self.parts.tasks),
                "timing": self.stopwatch.seconds,
                "fingerprints": self.fingerprints,
                "memory": memory_prints(self.kept.memory),
                "stores": self.stores,
                "results": self.board.results.plain(),
                "logged_steps": self.logged_steps,
                **(more or {}),
            }
            if watch is not None:
                progress["watch"] = watch.plain()
            self.checkpoints.wait()  # what is staged includes the one before, whole
            self.loops.forget()
            self.uploads.stage()
            number = self.loops.checkpoint = self.checkpoints.save(state, progress=progress, data=data, mark=mark)
            self._saved_step = int(state.step)
            self.uploads.submit(number)
            return number

    def _seconds_after(self, state: TrainState) -> float:
        """Seconds of the logged steps after a state, which are made again."""
        return seconds_after(self.folder.path / METRICS, int(state.step)) if self.main else 0.0
