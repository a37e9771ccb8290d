"""A run that is asked to stop between the steps of training continues with the next batch, and changes no bit."""

from __future__ import annotations

import collections
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.same_runs import differences
from jaxcl import cli
from jaxcl.config.file import dump_yaml
from jaxcl.evaluation import end_tasks
from jaxcl.run import remembering
from jaxcl.run.evaluator import Evaluator
from jaxcl.run.folder import RunFolder
from jaxcl.run.halfway import halfway_loops
from jaxcl.training.interrupt import StoppedTogether
from jaxcl.training.task import RunningTask
from tests.test_task_end import files_of
from tests.tiny.faults import asked_to_stop
from tests.tiny.runs import PAIRS, SEEKR, TEXT, run
from tests.tiny.trainer import one_device

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
ONE = {**CONTENT, "tasks": CONTENT["tasks"][:1], "evaluation": {"batch_size": 4, "limit": 1, "max_new_tokens": 24}}
KEEPING = {**SEEKR, "replay": {"fraction": 0.5, "choose": "highest_loss"}}
PAPER = {"name": "das_paper", "importance_examples": 24}
# By name: the configuration; and the loops that are stopped, each in which batch.
CASES: dict[str, tuple[dict[str, Any], Any, dict[str, int]]] = {
    "seekr": (ONE, {**SEEKR, "replay": {"fraction": 0.5}}, {"after 0.0": 1, "after 0.1": 1}),
    "seekr, all loops": (
        CONTENT,
        KEEPING,
        {"after 0.0": 2, "after 0.2": 2, "score 0 0.0": 1, "after 1.0": 3, "after 1.2": 1, "dev 0.0": 1, "dev 1.0": 1},
    ),
    "ssu": (CONTENT, {"name": "ssu", "importance_examples": 24}, {"before 0.0": 1, "after 1.0": 2}),
    "ewc": (CONTENT, {"name": "ewc", "fisher_examples": 24}, {"after 0.0": 2, "score 1 0.0": 2}),
    "das": (
        DOMAINS,
        {"name": "das", "importance_examples": 24},
        {"before 0.0": 1, "after 0.0": 2, "score 0 0.0": 1, "score 0 0.1": 2, "score 1 1.0": 1},
    ),
    "das_paper": (CONTENT, PAPER, {"before 0.0": 2, "after 0.0": 1}),
}


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How many batches are worked on between the steps of training, from now on; how often a model is fine-tuned."""
    done = collections.Counter[str]()
    places = ((RunningTask, "_place"), (Evaluator, "_place"), (Evaluator, "_answer"))
    for owner, name in (*places, (remembering, "place_batch"), (end_tasks, "_fine_tune")):
        function = getattr(owner, name)

        def noted(*arguments: Any, function: Any = function, label: str = f"{owner.__name__}.{name}") -> Any:
            done[label] += 1
            return function(*arguments)

        monkeypatch.setattr(owner, name, noted)
    return done


def same(one: Path, other: Path) -> None:
    assert not list(differences(one, other))
    for name in ("memory.json", "memory", "teacher", "predictions", "importance"):
        assert files_of(one, name) == files_of(other, name), name
    assert not (one / "halfway").exists()


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "seekr")) for name in CASES])
def test_stopped_in_a_loop_it_continues_with_the_next_batch(
    name: str, tmp_path: Path, work: collections.Counter[str]
) -> None:
    content, method, loops = CASES[name]
    run(content, tmp_path / "whole", method)
    expected = work.copy()
    work.clear()
    for loop, batch in loops.items():
        with asked_to_stop(loop, batch):
            run(content, tmp_path / "run", method)
    assert run(content, tmp_path / "run", method).finished
    if name == "das":  # a repetition of an end task that is stopped begins anew
        assert work["jaxcl.evaluation.end_tasks._fine_tune"] == expected["jaxcl.evaluation.end_tasks._fine_tune"] + 1
        work["Evaluator._place"] = expected["Evaluator._place"]
        work["jaxcl.evaluation.end_tasks._fine_tune"] -= 1
    assert work == expected
    same(tmp_path / "run", tmp_path / "whole")


def test_a_machine_that_comes_back_without_its_disk_continues_with_the_next_batch(
    tmp_path: Path, work: collections.Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def go(name: str, local: str) -> int:
        places = {"output": str(tmp_path / name)}
        if local:
            places = {"output": f"file://{tmp_path / name}", "local_output": str(tmp_path / local)}
        (tmp_path / "config.yaml").write_text(dump_yaml({**DOMAINS, **places, "method": method, "tasks": tasks}))
        return cli.main(["run", str(tmp_path / "config.yaml")])

    method, tasks = {"name": "ssu", "importance_examples": 24}, [{**DOMAINS["tasks"][1]}]
    assert go("whole", "") == 0
    expected = work.copy()
    work.clear()
    for number, (loop, batch) in enumerate({"before 0.0": 2, "score 0 0.0": 1}.items()):
        with asked_to_stop(loop, batch, code=130):
            assert go("bucket", f"life{number}") == 130
        assert [path.name for path in (tmp_path / f"life{number}/halfway").iterdir()] == [
            f"{loop.replace(' ', '-')}_process000.values"
        ]
        assert capsys.readouterr().err.endswith("jaxcl run: interrupted; run the same command again to resume\n")
        shutil.rmtree(tmp_path / f"life{number}")
    assert go("bucket", "last") == 0
    assert work == expected
    same(tmp_path / "last", tmp_path / "whole")
    assert not [name for name in (tmp_path / "bucket").rglob("*halfway*") if name.is_file()]


def test_what_is_saved_is_uploaded_once_the_latest_checkpoint_is_whole(tmp_path: Path) -> None:
    calls = list[str]()
    checkpoints: Any = SimpleNamespace(wait=lambda: calls.append("wait"))
    uploads: Any = SimpleNamespace(
        stage=lambda: calls.append("stage"), submit=lambda number: calls.append(f"submit {number}")
    )
    parts: Any = SimpleNamespace(layout=one_device())
    loops = halfway_loops(parts, RunFolder(tmp_path), checkpoints, uploads, None, {})

    def stop() -> None:
        with loops.phase("x"):
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(StoppedTogether):
        stop()
    assert calls == ["wait", "stage", "submit None"]
