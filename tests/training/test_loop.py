from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.interrupt import Interrupts, StoppedTogether
from jaxcl.training.loop import train_task
from jaxcl.training.trainer import Trainer
from tests.tiny.trainer import Collect, Rows, assert_same, host, make_params, make_rows, make_trainer, shared_trainer


def train(trainer: Trainer, total: int, rows: Any = None, **options: Any) -> Any:
    state = trainer.start_task(trainer.init(make_params()), total)
    feed = trainer.feed(rows or Rows(), prefetch=2)
    settings = {"total": total, "task": 0, "name": "numbers", "log_every": 4, "progress": False, **options}
    return train_task(trainer, state, feed, **settings)


def grain_rows() -> Any:
    """A real grain pipeline: shuffled anew in every epoch, without end."""
    examples = [make_rows(index, batch=1) for index in range(10)]

    def join(rows: list[dict[str, Any]]) -> dict[str, Any]:
        fields = {name: [row[name] for row in rows] for name in rows[0] if name not in ("origin", "predict")}
        return {name: np.concatenate(values) for name, values in fields.items()}

    source = grain.MapDataset.source(range(len(examples))).seed(7).shuffle().repeat()
    return iter(source.map(examples.__getitem__).batch(4, batch_fn=join).to_iter_dataset())


@pytest.mark.parametrize("rows", [Rows, grain_rows], ids=["plain", "grain"])
def test_a_resumed_run_is_bit_identical(tmp_path: Any, rows: Callable[[], Any]) -> None:
    options = {"total": 10, "task": 0, "name": "numbers", "log_every": 2, "progress": False}
    trainer = shared_trainer(dropout=0.3, accumulate=2, weight_decay=0.1)
    whole = Collect()
    expected = train(trainer, sinks=[whole], rows=rows(), **options)

    class Enough(Exception):
        pass

    with Checkpoints(tmp_path) as checkpoints:

        def save(state: Any, data: Any) -> None:
            checkpoints.save(state, progress={}, data=data)
            raise Enough

        with pytest.raises(Enough):
            train(trainer, rows=rows(), save=save, save_every=5, **options)

    with Checkpoints(tmp_path) as checkpoints:
        saved = checkpoints.latest()
        assert saved is not None
        state, position = checkpoints.restore(trainer.target, saved)
    assert int(state.clock.step) == 5
    feed = trainer.feed(rows(), prefetch=1)
    feed.set_state(position)
    rest = Collect()
    assert_same(expected, train_task(trainer, state, feed, sinks=[rest], **options))
    keys = ("step", "kind", "loss", "grad_norm", "tokens")
    later = [row for row in whole.rows if row["step"] > 5 + 1]
    assert [{key: row[key] for key in keys} for row in later] == [
        {key: row[key] for key in keys} for row in rest.rows if row["step"] > 5 + 1
    ]
    assert len(later) > 1


def test_rows_are_means_over_the_window_by_kind() -> None:
    every, window = Collect(), Collect()
    train(make_trainer(), 6, Rows(memory=True), sinks=[every], log_every=1)
    train(make_trainer(), 6, Rows(memory=True), sinks=[window], log_every=6)
    assert [row["step"] for row in every.rows] == [1, 2, 3, 4, 5, 6]
    assert [row["kind"] for row in every.rows] == ["task", "task", "memory"] * 2
    assert [(row["step"], row["kind"], row["steps"]) for row in window.rows] == [(6, "task", 4), (6, "memory", 2)]
    for row in window.rows:
        same = [other for other in every.rows if other["kind"] == row["kind"]]
        for name in ("loss", "term/lm", "tokens", "learning_rate"):
            assert row[name] == pytest.approx(np.mean([other[name] for other in same]), rel=1e-6)
        assert row["task"] == 0
        assert row["seconds"] > 0


def test_the_last_window_may_be_short() -> None:
    sink = Collect()
    train(make_trainer(), 6, sinks=[sink], log_every=4)
    assert [(row["step"], row["steps"]) for row in sink.rows] == [(4, 4), (6, 2)]


def test_no_step_before_a_checkpoint_is_without_a_row() -> None:
    """A kill after the checkpoint loses what is not in the log by then: the steps are not made again."""
    sink, logged = Collect(), []

    def save(state: Any, data: Any) -> None:
        logged.append(sum(row["steps"] for row in sink.rows))

    train(make_trainer(), 8, sinks=[sink], log_every=4, save=save, save_every=3)
    assert logged == [3, 6]
    assert [(row["step"], row["steps"]) for row in sink.rows] == [(3, 3), (4, 1), (6, 2), (8, 2)]


def test_global_steps_go_on_over_tasks() -> None:
    trainer, sink = make_trainer(), Collect()
    state = trainer.init(make_params())
    for task, total in enumerate((3, 2)):
        state = trainer.start_task(state, total)
        feed = trainer.feed(Rows(), prefetch=0)
        state = train_task(
            trainer, state, feed, total=total, task=task, name="x", log_every=1, sinks=[sink], progress=False
        )
    assert [(row["task"], row["task_step"], row["step"]) for row in sink.rows] == [
        (0, 1, 1),
        (0, 2, 2),
        (0, 3, 3),
        (1, 1, 4),
        (1, 2, 5),
    ]


def test_metrics_are_read_one_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Lazy:
        def __init__(self, step: int) -> None:
            self.step = step

        def __array__(self, *_: Any, **__: Any) -> Any:
            events.append(f"read {self.step}")
            return np.float32(1.0)

    trainer = make_trainer()

    def step(state: Any, batch: Any) -> Any:
        number = len([event for event in events if event.startswith("step")]) + 1
        events.append(f"step {number}")
        return state, {"loss": Lazy(number), "tokens": np.float32(1), "skipped": np.float32(0)}

    monkeypatch.setattr(trainer, "step", step)
    train(trainer, 4)
    assert events == ["step 1", "step 2", "read 1", "step 3", "read 2", "step 4", "read 3", "read 4"]


def test_a_loss_that_is_not_finite_names_task_and_steps() -> None:
    class Poisoned(Rows):
        def __next__(self) -> Any:
            rows = super().__next__()
            if self.position == 7:
                rows["weights"] = np.full_like(rows["weights"], np.nan)
            return rows

    sink, saved = Collect(), []
    with pytest.raises(UserError, match=r"task numbers: .* nan at step 7 of 10.*steps 5 to 7.*learning_rate"):
        train(make_trainer(), 10, Poisoned(), sinks=[sink], save=lambda *_: saved.append(_), save_every=7)
    assert sink.rows[0]["step"] == 4
    assert not saved, "a broken state must not replace a good checkpoint"


def test_data_that_ends_early_is_an_error() -> None:
    with pytest.raises(UserError, match="task numbers: the data ended before step 4 of 5"):
        train(make_trainer(), 5, Rows(end=3))


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_the_last_whole_state_and_stops(number: signal.Signals) -> None:
    before = {name: signal.getsignal(name) for name in SIGNALS}

    class Interrupted(Rows):
        def __next__(self) -> Any:
            if self.position == 6:
                os.kill(os.getpid(), number)
            return super().__next__()

    saves: list[Any] = []
    with pytest.raises(StoppedTogether):
        train(make_trainer(), 1000, Interrupted(), save=lambda state, data: saves.append((host(state), data)))
    assert before == {name: signal.getsignal(name) for name in before}
    assert len(saves) == 1
    state, data = saves[0]
    steps = int(state.clock.step)
    assert 4 <= steps <= 7
    assert data == {"position": steps}
    trainer = make_trainer()
    expected = trainer.start_task(trainer.init(make_params()), 1000)
    feed = trainer.feed(Rows(), prefetch=0)
    for _ in range(steps):
        expected, _metrics = trainer.step(expected, next(feed))
    assert_same(expected, state)


def test_a_second_signal_does_not_wait() -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        interrupt()
        assert interrupts.requested == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) == before


def test_checkpoints_come_every_so_many_steps_and_not_at_the_end() -> None:
    steps: list[int] = []
    train(make_trainer(), 6, save=lambda state, data: steps.append(int(state.step)), save_every=2)
    assert steps == [2, 4]


@pytest.mark.parametrize(("at", "expected"), [(3, [2, 3, 4]), (4, [2, 4]), (6, [2, 4, 6])])
def test_a_checkpoint_may_be_asked_for_at_any_step(at: int, expected: list[int]) -> None:
    steps: list[int] = []
    save = lambda state, data: steps.append(int(state.step))  # noqa: E731
    train(make_trainer(), 6, save=save, save_every=2, save_at=at)
    assert steps == expected


def test_a_finished_task_is_left_alone() -> None:
    trainer = make_trainer()
    state = train(trainer, 3)
    again = train_task(
        trainer,
        state,
        trainer.feed(Rows(), prefetch=0),
        total=3,
        task=0,
        name="x",
        log_every=1,
        progress=False,
    )
    assert int(again.step) == 3
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(again))
