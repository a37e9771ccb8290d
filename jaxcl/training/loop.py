"""The loop over the steps of one task, independent of the method."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxcl.errors import UserError
from jaxcl.training.feed import Feed
from jaxcl.training.interrupt import Agreement, Interrupts, StoppedTogether
from jaxcl.training.profile import Profiler
from jaxcl.training.sinks import Progress, Sink
from jaxcl.training.state import TrainState
from jaxcl.training.step import Metrics
from jaxcl.training.trainer import Trainer
from jaxcl.training.watch import NotFinite, Watch

Save = Callable[[TrainState, Any], object]
"""`save(state, data_state)`: writes a checkpoint of the state between two steps and of the position in the data."""


class _Pending(NamedTuple):
    """A dispatched step whose metrics have not been read yet."""

    task_step: int
    kind: str
    metrics: Metrics
    vote: Any


def train_task(
    trainer: Trainer,
    state: TrainState,
    feed: Feed,
    *,
    total: int,
    task: int,
    name: str,
    log_every: int,
    sinks: Sequence[Sink] = (),
    save: Save | None = None,
    save_every: int = 0,
    save_at: int | None = None,
    progress: bool = True,
    profiler: Profiler | None = None,
    watch: Watch | None = None,
) -> TrainState:
    """Trains to the end of a task, from the state's position in it.

    Metrics of a step are read after the next step has been dispatched, so the devices never wait for the host.

    Args:
      trainer: the run's trainer.
      state: a state within the task (`Trainer.start_task`, or a restored one); donated.
      feed: the task's batches, at the state's position.
      total: optimizer steps of the task.
      task: index of the task, for the log.
      name: name of the task, for messages.
      log_every: steps between rows given to the sinks; a checkpoint also ends a row. There is one row per kind of batch
        that occurred, with `step`, `task`, `task_step`, `kind`, `steps`, `skipped`, `spikes`, `seconds`,
        `tokens_per_second`, and the means over those of the steps that were not skipped.
      sinks: where rows go; empty on all processes but the first.
      save: writes a checkpoint; `None`: none is written.
      save_every: steps between checkpoints within the task; 0: none. The caller saves the state at the end. After a
        skipped step the checkpoint waits for one that is not, so that it never lies where training may have to go back.
      save_at: a step of the task after which a checkpoint is written in any case, even if it is the last.
      progress: whether to show progress.
      profiler: traces some steps; `None`: no trace.
      watch: counts skipped steps and spikes of the loss, and decides when to stop; `None`: at the first skipped step.

    Returns:
      The state after step `total` of the task.

    Raises:
      NotFinite: too many steps in a row were skipped, or params are not finite after a step. Names the task and the
        steps. The state's arrays are deleted, so that a checkpoint can be restored in their place.
      UserError: the feed ends early. Names the task and the step.
      StoppedTogether: a `KeyboardInterrupt`: a process received SIGINT, SIGTERM or SIGUSR1; the state after the last
        finished step has been saved. After a skipped step, training goes on until one is not skipped (then it is
        saved) or until it would have to go back to a checkpoint.
    """
    first = int(state.clock.step)
    offset = int(state.step) - first
    watch = watch or Watch()
    log = _Log(name, task, sinks, log_every, total, offset=offset, first=first, watch=watch)
    profiler = profiler or Profiler("", None)
    bar = Progress(name, done=first, total=total, enabled=progress)
    agreement = Agreement(trainer.layout.mesh)
    pending: _Pending | None = None
    stop = due = False

    def read(last: _Pending | None) -> bool:
        """Waits for a step and logs its metrics; returns whether to stop."""
        if last is None:
            return False
        metrics = {key: float(value) for key, value in jax.device_get(last.metrics).items()}
        log.add(last.task_step, last.kind, metrics)
        bar.advance(metrics["loss"], metrics["tokens"])
        return agreement.answer(last.vote)

    with Interrupts() as interrupts:
        try:
            for step in range(first + 1, total + 1):
                batch = _next(feed, name, step, total)
                vote = agreement.ask(interrupts.requested is not None)
                with profiler.step(offset + step, state):
                    state, metrics = trainer.step(state, batch)
                profiler.done(offset + step, metrics)
                previous, pending = pending, _Pending(step, batch.origin, metrics, vote)
                stop = read(previous) or stop
                due = due or (save_every > 0 and step % save_every == 0 and step < total)
                if stop or due or step == save_at:
                    # What is saved has been read before.
                    stop, pending = read(pending) or stop, None
                    if watch.streak and step not in (save_at, total):
                        continue
                    due = False
                    log.flush()  # a run that goes on from the checkpoint does not log these steps again
                    if save is not None:
                        save(state, feed.get_state())
                    if stop:
                        raise StoppedTogether
            read(pending)
        except NotFinite:
            jax.tree.map(lambda leaf: leaf.delete(), state)
            # All processes are here, for the same step. One that was asked to stop would otherwise forget it.
            if agreement.answer(agreement.ask(interrupts.requested is not None)):
                raise StoppedTogether from None
            raise
        finally:
            profiler.close()
            log.flush()
            bar.close()
    return state


class _Log:
    """Means over `every` steps, one row per kind of batch; stops a run whose metrics are not finite."""

    def __init__(
        self, name: str, task: int, sinks: Sequence[Sink], every: int, total: int, offset: int, first: int, watch: Watch
    ) -> None:
        self._name, self._task, self._sinks, self._every = name, task, sinks, every
        self._total, self._offset, self._watch = total, offset, watch
        self._rows: dict[str, list[dict[str, float]]] = {}
        self._last, self._opened, self._since = first, first, time.monotonic()

    def add(self, task_step: int, kind: str, metrics: dict[str, float]) -> None:
        spikes = len(self._watch.spikes)
        bad = self._watch.add(task_step, kind, metrics)
        if bad is not None:
            raise NotFinite(self._reason(bad, metrics[bad], task_step), task_step)
        metrics["spikes"] = float(len(self._watch.spikes) - spikes)
        self._rows.setdefault(kind, []).append(metrics)
        self._last = task_step
        if task_step % self._every == 0 or task_step == self._total:
            self.flush()

    def _reason(self, name: str, value: float, step: int) -> str:
        first = step - max(self._watch.streak, 1) + 1
        steps = f"step {step}" if first == step else f"steps {first} to {step}"
        return (
            f"task {self._name}: {name} is {value} at {steps} of {self._total}, after finite values up to step "
            f"{first - 1} (checked steps {self._opened + 1} to {step}); lower optimizer.learning_rate or lengthen "
            "optimizer.warmup"
        )

    def flush(self) -> None:
        """Writes the rows of the steps since the last flush."""
        now = time.monotonic()
        seconds = now - self._since
        tokens = sum(row["tokens"] for rows in self._rows.values() for row in rows)
        for kind, rows in self._rows.items():
            made = [row for row in rows if not row["skipped"]]
            counts = {name: int(sum(row[name] for row in rows)) for name in ("skipped", "spikes")}
            means = {key: sum(row[key] for row in made) / len(made) for key in made[0]} if made else {}
            row = {
                "step": self._offset + self._last,
                "task": self._task,
                "task_step": self._last,
                "kind": kind,
                "steps": len(rows),
                "seconds": seconds,
                "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
                **means,
                **counts,
            }
            for sink in self._sinks:
                sink.write(row)
        self._rows, self._opened, self._since = {}, self._last, now


def _next(feed: Feed, name: str, step: int, total: int) -> Any:
    try:
        return next(feed)
    except StopIteration:
        raise UserError(f"task {name}: the data ended before step {step} of {total}") from None
