"""What a run says when it goes on: other versions, files that are gone, checkpoints that it will need."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxcl.config import parse_config
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.run import scoreboard, sequence
from jaxcl.run.ending import finished_results
from jaxcl.run.folder import RunFolder
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import PAIRS, SEEKR, run

CONTENT: dict[str, Any] = {
    **PAIRS,
    "tasks": [{**task, "test": 2} for task in PAIRS["tasks"]],
    "training": {**PAIRS["training"], "steps": 3, "epochs": None},
    "evaluation": {"batch_size": 4, "max_new_tokens": 24},
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed within its second task, after step 2 of it."""
    folder = tmp_path_factory.mktemp("attempts") / "run"
    with killed_at_save(4):
        run(CONTENT, folder, SEEKR)
    return folder


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def test_versions_are_recorded_by_attempt_and_changes_are_said(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = Results.read(copy / "results.json")
    assert [attempt.model_dump() for attempt in begun.attempts] == [{"step": 0, "changed": {}}]
    now = {**begun.versions, "jax": "99.0"}
    del now["numpy"]
    monkeypatch.setattr(scoreboard, "installed_versions", lambda: now)
    with killed_at_save(1):
        run(CONTENT, copy, SEEKR)
    said = (
        f"other versions: jax 99.0 (before: {begun.versions['jax']}), numpy gone (before: {begun.versions['numpy']});"
    )
    assert said in capsys.readouterr().err
    newest = max((copy / "checkpoints").iterdir(), key=lambda path: int(path.name))
    noted = json.loads((newest / "progress" / "metadata").read_text())["progress"]["results"]["attempts"]
    assert noted == [{"step": 0, "changed": {}}, {"step": 5, "changed": {"jax": "99.0", "numpy": None}}]
    results = run(CONTENT, copy, SEEKR)
    assert "other versions" not in capsys.readouterr().err, "they are those of the attempt before"
    assert [attempt.changed for attempt in results.attempts] == [{}, {"jax": "99.0", "numpy": None}, {}]
    assert results.versions == begun.versions
    assert results.latest_versions == now


GONE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "nothing": (lambda folder: None, []),
    "the log": (
        lambda folder: (folder / "metrics.jsonl").unlink(),
        ["metrics.jsonl: 5 of 5 logged steps are missing; the run goes on without them"],
    ),
    "a row": (
        lambda folder: (folder / "metrics.jsonl").write_text(
            "".join((folder / "metrics.jsonl").read_text().splitlines(keepends=True)[1:])
        ),
        ["metrics.jsonl: 1 of 5 logged steps are missing"],
    ),
    "predictions": (
        lambda folder: shutil.rmtree(folder / "predictions"),
        ["predictions: 1 file missing of tasks that are scored, such as after00_task00.jsonl; the run goes on"],
    ),
}


@pytest.mark.parametrize("name", GONE)
def test_what_is_gone_of_the_folder_is_one_line(copy: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    change, said = GONE[name]
    change(copy)
    with killed_at_save(1):
        run(CONTENT, copy, SEEKR)
    lines = [line for line in capsys.readouterr().err.splitlines() if "missing" in line]
    assert len(lines) == len(said)
    assert all(f"{copy}/{words}" in line for words, line in zip(said, lines, strict=True))
    run(CONTENT, copy, SEEKR)
    again = [line for line in capsys.readouterr().err.splitlines() if "logged steps" in line]
    assert not again, "what is gone is said once"


@pytest.mark.parametrize("removed", [False, True])
def test_a_checkpoint_that_the_method_will_need_is_looked_at_before_training(
    copy: Path, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    monkeypatch.setattr(sequence, "train_task", lambda *_, **__: pytest.fail("trained"))
    places = sorted((copy / "checkpoints").iterdir(), key=lambda path: int(path.name))
    notes = {path: json.loads((path / "progress" / "metadata").read_text()) for path in places}
    (before,) = (path for path in places if notes[path]["mark"] == "after task 0")
    if removed:
        shutil.rmtree(before)
        words = "the one after task 0 is missing; the run cannot be resumed"
    else:
        next((before / "params" / "d").iterdir()).write_bytes(b"")
        words = rf"checkpoint {before.name} cannot be used: .* is damaged"
    with pytest.raises(UserError, match=words):
        run(CONTENT, copy, SEEKR)


def test_a_run_is_finished_if_scores_and_checkpoints_say_so(copy: Path) -> None:
    """The same for clients and server of federated training."""
    folder = RunFolder(copy)
    config = parse_config({**CONTENT, "output": str(copy), "method": SEEKR})
    done = json.loads((copy / "results.json").read_text()) | {"finished": True}
    whole = {**done, "matrix": [[1.0, None], [1.0, 1.0]]}
    for content in (done, whole):
        (copy / "results.json").write_text(json.dumps(content))
        assert finished_results(folder, config) is None
    shutil.rmtree(copy / "checkpoints")
    assert finished_results(folder, config) is not None, "its checkpoints were removed"
    (copy / "results.json").write_text(json.dumps(done))
    assert finished_results(folder, config) is None
