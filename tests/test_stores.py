"""A run goes on only with the teacher stores that it wrote itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxcl.commands.teacher import describe_teacher
from jaxcl.data.teacher_store import store_digest, write_records
from jaxcl.errors import UserError
from jaxcl.run import sequence
from jaxcl.training.checksums import write_checksums
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import PAIRS, SEEKR, run

CONTENT: dict[str, Any] = {
    **PAIRS,
    "tasks": [{**task, "test": 2} for task in PAIRS["tasks"]],
    "training": {"batch_size": 8, "steps": 2, "log_every": 1, "checkpoint_every": 0},
    "evaluation": {"batch_size": 4, "max_new_tokens": 24},
}
STORE = "task00_process000.array_record"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that differ in the learning rate, and were killed after their first task."""
    root = tmp_path_factory.mktemp("stores")
    for name, rate in (("one", 1e-3), ("other", 3e-2)):
        with killed_at_save(2):
            run({**CONTENT, "optimizer": {"learning_rate": rate}}, root / name, SEEKR)
    return root


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped / "one", tmp_path / "run"))


def edit_note(folder: Path, **changes: Any) -> None:
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    place = newest / "progress" / "metadata"
    note = json.loads(place.read_text())
    note["progress"] |= changes
    place.write_text(json.dumps({**note, "progress": {k: v for k, v in note["progress"].items() if v is not None}}))
    write_checksums(newest)


def test_a_store_of_another_run_is_one_line_before_training(
    stopped: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "train_task", lambda *_, **__: pytest.fail("trained"))
    place = copy / "teacher" / STORE
    words = {
        "is not the store that the run wrote": lambda: shutil.copy(stopped / "other" / "teacher" / STORE, place),
        "is missing: it holds what is stored": place.unlink,
        "does not belong to the run, whose stores of task 0": lambda: (
            shutil.copy(stopped / "one" / "teacher" / STORE, place),
            shutil.copy(place, copy / "teacher" / STORE.replace("000.", "001.")),
        ),
    }
    for expected, change in words.items():
        change()
        with pytest.raises(UserError, match=rf"{copy}/teacher/task00_process00[01].array_record {expected}") as caught:
            run({**CONTENT, "optimizer": {"learning_rate": 1e-3}}, copy, SEEKR)
        assert "\n" not in str(caught.value)
        if place.exists():
            with pytest.raises(UserError, match=expected):
                describe_teacher(copy)


def test_a_checkpoint_from_before_digests_is_gone_on_from_and_they_are_noted_then(copy: Path) -> None:
    edit_note(copy, stores=None)
    assert run({**CONTENT, "optimizer": {"learning_rate": 1e-3}}, copy, SEEKR).finished
    newest = max((copy / "checkpoints").iterdir(), key=lambda path: int(path.name))
    noted = json.loads((newest / "progress" / "metadata").read_text())["progress"]["stores"]
    assert noted == {
        str(task): {path.name: store_digest(path) for path in (copy / "teacher").glob(f"task0{task}_*")}
        for task in range(2)
    }


def test_stores_of_more_processes_are_recognised(copy: Path) -> None:
    """What two processes wrote is gone on with by one."""
    store, other = copy / "teacher" / STORE, copy / "teacher" / STORE.replace("000.", "001.")
    about = {"task": "none"}
    write_records(other, [], about)
    digests = {path.name: store_digest(path) for path in (store, other)}
    edit_note(copy, stores={"0": digests})
    with pytest.raises(UserError, match="is the store of another run: task none, here direction"):
        run({**CONTENT, "optimizer": {"learning_rate": 1e-3}}, copy, SEEKR)  # known, and opened with the others


def test_digests_say_what_a_store_holds(tmp_path: Path) -> None:
    def digest(records: list[tuple[int, Any]], about: Any = None) -> str:
        write_records(tmp_path / "store", [(key, {"x": np.asarray(value)}) for key, value in records], about)
        return store_digest(tmp_path / "store")

    first = digest([(0, [1.0, 2.0]), (1, [3.0])])
    assert digest([(0, [1.0, 2.0]), (1, [3.0])]) == first
    others = [
        digest([(0, [1.0, 2.0]), (2, [3.0])]),
        digest([(0, [1.0, 2.5]), (1, [3.0])]),
        digest([(0, [1.0]), (1, [2.0, 3.0])]),
        digest([(0, [1.0, 2.0]), (1, [3.0])], {"task": "a"}),
    ]
    assert len({first, *others}) == 5
