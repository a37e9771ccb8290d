"""A run that is asked to stop between the steps of training continues with the next batch, and changes no bit."""

from __future__ import annotations

import collections
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.same_runs import differences
from jaxcl import cli
from jaxcl.config.file import dump_yaml
from jaxcl.evaluation.results import Results
from jaxcl.run import sequence
from jaxcl.run.evaluator import Evaluator
from jaxcl.training.task import RunningTask
from tests.test_task_end import files_of
from tests.tiny.faults import Interrupted, asked_to_stop, killed_at_save
from tests.tiny.runs import PAIRS, SEEKR, TEXT, run

CONTENT: dict[str, Any] = {
    **PAIRS,
    "tasks": [{**task, "test": 6, "dev": 4} for task in PAIRS["tasks"]],
    "training": {"batch_size": 8, "steps": 2, "log_every": 1, "checkpoint_every": 0},
    "evaluation": {"batch_size": 4, "max_new_tokens": 24, "dev": True},
}
DOMAINS: dict[str, Any] = {
    **TEXT,
    "training": {"batch_size": 8, "steps": 2, "log_every": 1, "checkpoint_every": 0},
    "evaluation": {"batch_size": 4, "end_task": {"epochs": 1, "batch_size": 8, "length": 32, "seeds": 2}},
}
KEEPING = {**SEEKR, "replay": {"fraction": 0.5, "choose": "highest_loss"}}
# By method: the configuration; and of loops, in order, how many batches they have.
CASES: dict[str, tuple[dict[str, Any], Any, dict[str, int]]] = {
    "seekr": (
        CONTENT,
        KEEPING,
        {"after 0.0": 4, "after 0.1": 2, "after 0.2": 2, "score 0 0.0": 2, "after 1.2": 2, "dev 1.0": 1},
    ),
    "ssu": (CONTENT, {"name": "ssu", "importance_examples": 24}, {"before 0.0": 3, "after 1.0": 3}),
    "ewc": (CONTENT, {"name": "ewc", "fisher_examples": 24}, {"after 0.0": 3}),
    "das": (
        DOMAINS,
        {"name": "das", "importance_examples": 24},
        {"before 0.0": 3, "after 0.0": 3, "score 0 0.0": 2, "score 0 0.1": 2, "score 1 1.0": 2},
    ),
    "das_paper": (CONTENT, {"name": "das_paper", "importance_examples": 24}, {"before 0.0": 3, "after 0.0": 3}),
}
SLOW = {"das", "das_paper", "ewc"}


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[collections.Counter[str]]:
    """How many batches are put on devices or answered between the steps of training, from now on."""
    done = collections.Counter[str]()
    for kind, name in ((RunningTask, "_place"), (Evaluator, "_place"), (Evaluator, "_answer")):
        method = getattr(kind, name)

        def noted(self: Any, *arguments: Any, method: Any = method, label: str = f"{kind.__name__}.{name}") -> Any:
            done[label] += 1
            return method(self, *arguments)

        monkeypatch.setattr(kind, name, noted)
    yield done


def same(one: Path, other: Path) -> None:
    assert not list(differences(one, other))
    for name in ("memory.json", "memory", "teacher", "predictions", "importance"):
        assert files_of(one, name) == files_of(other, name), name
    assert not (one / "halfway").exists()


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_stopped_in_every_loop_it_continues_with_the_next_batch(
    name: str, tmp_path: Path, work: collections.Counter[str]
) -> None:
    content, method, loops = CASES[name]
    run(content, tmp_path / "whole", method)
    expected = work.copy()
    work.clear()
    for loop, batches in loops.items():
        with asked_to_stop(loop, batches // 2 or 1):
            run(content, tmp_path / "run", method)
        assert list((tmp_path / "run/halfway").glob("*.values"))
    assert run(content, tmp_path / "run", method).finished
    # A repetition of an end task that is stopped begins anew.
    if name == "das":
        assert sum(work.values()) >= expected.total()
        assert {**work, "Evaluator._place": 0} == {**expected, "Evaluator._place": 0}
    else:
        assert work == expected
    same(tmp_path / "run", tmp_path / "whole")
