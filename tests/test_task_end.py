"""What comes after a task's last step: a stop there costs no training and no scores, and changes no bit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.same_runs import last_arrays
from jaxcl.evaluation.results import Results
from jaxcl.run import sequence
from jaxcl.run.evaluator import Evaluator
from jaxcl.run.sequence import TaskSequence
from tests.tiny.faults import Interrupted, killed_at_save
from tests.tiny.runs import PAIRS, SEEKR, numbers, run

# No checkpoint within a task.
CONTENT: dict[str, Any] = {
    **PAIRS,
    "tasks": [{**task, "test": 2} for task in PAIRS["tasks"]],
    "training": {"batch_size": 8, "steps": 3, "log_every": 2, "checkpoint_every": 0, "keep": 2},
    "evaluation": {"batch_size": 4, "max_new_tokens": 24},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(CONTENT, folder, SEEKR)
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tasks that are trained, from now on."""
    found, train = list[int](), sequence.train_task

    def noted(*arguments: Any, **options: Any) -> Any:
        found.append(options["task"])
        return train(*arguments, **options)

    monkeypatch.setattr(sequence, "train_task", noted)
    return found


@contextlib.contextmanager
def killed_in(name: str, index: int) -> Iterator[None]:
    """The run in the block is killed when a step of the consolidation of a task is done."""
    step = getattr(TaskSequence, name)

    def do_or_die(self: Any, *arguments: Any) -> Any:
        found = step(self, *arguments)
        if arguments[-1] == index:
            raise Interrupted
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TaskSequence, name, do_or_die)
        with pytest.raises(Interrupted):
            yield


def files_of(folder: Path, name: str) -> dict[Path, bytes]:
    """What a file or a folder of a run holds."""
    paths = [folder / name, *(folder / name).rglob("*")]
    return {path.relative_to(folder): path.read_bytes() for path in paths if path.is_file()}


def same(one: Path, other: Path) -> None:
    assert numbers(one) == numbers(other)
    arrays, others = last_arrays(one / "checkpoints"), last_arrays(other / "checkpoints")
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)
    found, expected = (Results.read(folder / "results.json") for folder in (one, other))
    for field in ("matrix", "initial", "steps", "data", "skipped", "spikes", "stored_bytes", "finished"):
        assert getattr(found, field) == getattr(expected, field), field
    for name in ("memory.json", "teacher", "predictions"):
        files = [files_of(folder, name) for folder in (one, other)]
        assert files[0], name
        assert files[0] == files[1], name


def test_a_task_is_not_trained_again_for_what_follows_it(whole: Path, tmp_path: Path, trained: list[int]) -> None:
    """Killed in the consolidation of either task, at its stages, and right after the checkpoint before it."""
    folder = tmp_path / "run"
    for kill in (
        killed_in("_remember", 0),
        killed_in("_consolidate", 0),
        killed_in("_store", 0),
        killed_at_save(1, trained=True),
        killed_in("_conclude", 1),
    ):
        with kill:
            run(CONTENT, folder, SEEKR)
    assert run(CONTENT, folder, SEEKR).timing.get("lost", 0) == 0
    assert trained == [0, 1]
    same(folder, whole)


def test_a_damaged_checkpoint_after_a_task_costs_its_consolidation_only(
    whole: Path, tmp_path: Path, trained: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with killed_at_save(2):
        run(CONTENT, folder, SEEKR)
    newest = max((path for path in (folder / "checkpoints").iterdir()), key=lambda path: int(path.name))
    assert json.loads((newest / "progress" / "metadata").read_text())["progress"]["phase"] == "learned"
    next((newest / "params" / "d").iterdir()).write_bytes(b"")
    run(CONTENT, folder, SEEKR)
    assert f"the run goes on from checkpoint {int(newest.name) - 1}" in capsys.readouterr().err
    assert trained == [0, 1]
    same(folder, whole)


def test_what_is_scored_is_not_scored_again(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score, calls = Evaluator.score, list[tuple[int, int]]()

    def noted(self: Any, params: Any, index: int, after: int) -> Any:
        calls.append((after, index))
        if calls == [(0, 0), (1, 0), (1, 1)]:
            raise Interrupted
        return score(self, params, index, after)

    monkeypatch.setattr(Evaluator, "score", noted)
    with pytest.raises(Interrupted):
        run(CONTENT, tmp_path / "run", SEEKR)
    assert len(Results.read(tmp_path / "run" / "results.json").matrix) == 2
    run(CONTENT, tmp_path / "run", SEEKR)
    assert calls[3:] == [(1, 1)]
    same(tmp_path / "run", whole)


def test_a_method_that_consolidates_nothing_saves_a_task_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases, save = list[str](), TaskSequence._save

    def noted(self: Any, *arguments: Any, **options: Any) -> Any:
        phases.append(options["phase"])
        return save(self, *arguments, **options)

    monkeypatch.setattr(TaskSequence, "_save", noted)
    run(CONTENT, tmp_path / "run", "sequential")
    assert phases == ["learned"] * 3
