"""What the comparison of a killed run with an undisturbed one must not overlook."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.chaos.campaign import compare, wait_for

WEIGHTS = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)


def save(folder: Path, weights: np.ndarray) -> None:
    """A checkpoint with two arrays."""
    place = folder / "checkpoints" / "8" / "state"
    shutil.rmtree(place, ignore_errors=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(place.resolve(), {"params": {"kernel": weights}, "step": np.array(8)})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, with something of each kind that is compared."""
    folder = tmp_path_factory.mktemp("compare") / "whole"
    save(folder, WEIGHTS)
    rows = [{"step": step, "loss": 1 / step, "seconds": 0.25} for step in (2, 4, 6, 8)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps({"matrix": [[0.5]], "timing": {"training": 3.0}}))
    for name in ("memory.json", "memory/0.json", "teacher/0", "predictions/0.jsonl", "tokenizer/tokenizer.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


def flip_a_bit(folder: Path) -> None:
    weights = WEIGHTS.copy()
    weights.view(np.uint32)[2, 3] ^= 1
    save(folder, weights)


def rewrite(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (flip_a_bit, "state['params']['kernel']: other values"),
        (lambda folder: save(folder, WEIGHTS.astype(np.float64)), "state['params']['kernel']: other values"),
        (rewrite("metrics.jsonl", '"loss": 0.25', '"loss": 0.2500001'), "metrics.jsonl"),
        (rewrite("metrics.jsonl", '{"step": 2, "loss": 0.5, "seconds": 0.25}\n', ""), "metrics.jsonl"),
        (rewrite("results.json", "[[0.5]]", "[[0.25]]"), "results.json: matrix: [[0.5]] and [[0.25]]"),
        (rewrite("memory.json", "memory", "Memory"), "memory.json: other bytes"),
        (rewrite("teacher/0", "0", "1"), "teacher/0: other bytes"),
        (lambda folder: (folder / "predictions/0.jsonl").unlink(), "predictions/0.jsonl: only in one of them"),
        (lambda folder: (folder / "memory/1.json").touch(), "memory/1.json: only in one of them"),
        (lambda folder: (folder / "x.partial").touch(), "x.partial is left over"),
        (lambda folder: (folder / "checkpoints/9.tmp").mkdir(), "checkpoints/9.tmp is left over"),
    ],
)  # fmt: skip
def test_each_difference_is_reported(change: Callable[[Path], object], line: str, whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    rewrite("metrics.jsonl", '"seconds": 0.25', '"seconds": 9.5')(other)  # times may differ
    rewrite("results.json", "3.0", "4.0")(other)
    assert list(compare(whole, other)) == []
    rewrite("metrics.jsonl", '"seconds": 9.5', '"seconds": 0.25')(other)
    change(other)
    assert list(compare(whole, other)) == [line]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_after(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.parametrize(("seconds", "alone"), [(0.0, 1), (1.0, 1), (60.0, 0)])
def test_a_process_that_outlives_a_killed_one_is_reported(seconds: float, alone: int) -> None:
    context = multiprocessing.get_context("forkserver")
    members = [context.Process(target=end_after, args=(seconds,)), context.Process(target=die)]
    for one in members:
        one.start()
    found = wait_for(members, 1, stated=5)
    assert found == (alone, [] if alone else ["process 0 did not end within 5 s after process 1"])
    assert all(one.exitcode is not None for one in members)
