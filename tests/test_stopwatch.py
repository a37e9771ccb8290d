"""Where the time of a run goes, with a clock that is moved by hand, and in a run that was killed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxcl.evaluation.results import Results
from jaxcl.reporting.goodput import goodput
from jaxcl.run import stopwatch as module
from jaxcl.run.stopwatch import Stopwatch
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.sinks import seconds_after
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import PAIRS, run

SHORT: dict[str, Any] = {
    **PAIRS,
    "training": {"batch_size": 8, "steps": 6, "log_every": 1, "checkpoint_every": 2},
    "evaluation": {"batch_size": 4, "limit": 2, "max_new_tokens": 24},
}


class Hand:
    """A clock and a compiler that take what they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module, "_compiled", 7.0)

    def compile(self, seconds: float) -> None:
        self.now += seconds
        module._listen("/jax/core/compile/backend_compile_duration", seconds)
        module._listen("/jax/another", 99.0)


def test_nested_parts_and_compiling_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(monkeypatch)
    watch = Stopwatch()
    with watch.part("training"):
        hand.now += 5.0
        hand.compile(2.0)
        with watch.part("checkpoints"):
            hand.now += 1.0
            # A checkpoint says what was measured so far, of open parts as well.
            assert watch.seconds == {"training": 5.0, "compiling": 2.0, "checkpoints": 1.0}
            hand.compile(0.5)
        hand.now += 4.0
    assert watch.seconds == {"training": 9.0, "checkpoints": 1.0, "compiling": 2.5}
    assert goodput(watch.seconds) == 9.0 / 12.5


def test_what_was_compiled_before_belongs_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    hand = Hand(monkeypatch)
    hand.compile(3.0)
    watch = Stopwatch()
    with watch.part("data"):
        hand.now += 1.0
    assert watch.seconds == {"data": 1.0}


def test_a_run_that_goes_on_adds_up_its_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    hand, watch = Hand(monkeypatch), Stopwatch()
    with watch.part("data"):
        hand.now += 1.0
    watch.resume({"data": 2.0, "training": 8.0, "lost": 4.0})
    assert watch.seconds == {"data": 3.0, "training": 8.0, "lost": 4.0}
    watch.lose(5.0)
    assert watch.seconds == {"data": 3.0, "training": 3.0, "lost": 9.0}


def test_seconds_of_steps_are_those_of_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert seconds_after(path, 0) == 0
    # Step 4 ends a row of either kind, which took 3 seconds together; the last line is torn.
    rows = [(2, "task", 1.5), (4, "task", 3.0), (4, "memory", 3.0), (6, "task", 4.0)]
    lines = [json.dumps({"step": step, "kind": kind, "seconds": seconds}) for step, kind, seconds in rows]
    path.write_text("\n".join([*lines, lines[0][:9]]))
    assert [seconds_after(path, step) for step in (0, 2, 4, 6)] == [8.5, 7.0, 4.0, 0.0]


def test_jax_reports_what_it_compiles() -> None:
    before = module._compiled
    jax.jit(lambda x: jnp.sin(x) + time.monotonic_ns() % 97)(jnp.ones(3)).block_until_ready()
    assert module._compiled > before


def test_a_run_that_was_killed_says_what_was_lost(tmp_path: Path) -> None:
    began = time.time()
    folder = tmp_path / "run"
    with killed_at_save(3, before=True):
        run(SHORT, folder, "sequential")
    with Checkpoints.reading(folder / "checkpoints") as checkpoints:
        progress = checkpoints.notes()[-1].progress
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    after = [row["seconds"] for row in rows if row["step"] > 2]
    assert len(after) == 2  # the checkpoint is that of step 2
    # When a file was copied says nothing about when steps were made.
    os.utime(folder / "metrics.jsonl", (2e9, 2e9))
    timing = run(SHORT, folder, "sequential").timing
    assert timing["lost"] == pytest.approx(sum(after), abs=2e-3)
    assert timing["recovery"] > 0
    assert timing["startup"] >= progress["timing"]["startup"]
    # Both attempts, and nothing twice.
    assert progress["timing"]["training"] < timing["training"] < time.time() - began
    assert sum(timing.values()) < time.time() - began
    assert Results.read(folder / "results.json").timing == timing
