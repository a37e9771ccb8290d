"""Notes of checkpoints that another version of jaxcl wrote, or somebody edited: read, or refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxcl.commands.generate import generate_text
from jaxcl.errors import UserError
from jaxcl.run import sequence
from jaxcl.run.note import FORMAT, note_of
from jaxcl.training.checkpoint import Checkpoints, Saved
from jaxcl.training.checksums import write_checksums
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import PAIRS, run

CONTENT: dict[str, Any] = {
    **PAIRS,
    "tasks": [{**task, "test": 2} for task in PAIRS["tasks"]],
    "training": {**PAIRS["training"], "keep": 2},
    "evaluation": {"batch_size": 4, "max_new_tokens": 24},
}
REPLAY = {"name": "replay", "replay": {"fraction": 0.25}}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed within its first task, after step 2."""
    folder = tmp_path_factory.mktemp("notes") / "run"
    with killed_at_save(2):
        run(CONTENT, folder, REPLAY)
    return folder


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the note of the newest checkpoint, whose checksums still fit."""
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    place = newest / "progress" / "metadata"
    note = json.loads(place.read_text())
    change(note["progress"])
    place.write_text(json.dumps(note))
    write_checksums(newest)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an empty note": (lambda note: note.clear(), "task: Field required"),
    "no fingerprints": (lambda note: note.pop("fingerprints"), "fingerprints: Field required"),
    "no memory": (lambda note: note.pop("memory"), "memory: Field required"),
    "no tokenizer": (lambda note: note["fingerprints"].pop("tokenizer"), "fingerprints.tokenizer: Field required"),
    "results with more": (lambda note: note["results"].update(brand_new=1), "results.brand_new: Extra inputs are not"),
    "results with less": (lambda note: note["results"].pop("metric"), "results.metric: Field required"),
    "a matrix of others": (lambda note: note["results"].update(matrix=[[1.0] * 9]), "results.matrix: "),
    "another watch": (lambda note: note["watch"].update(new=1), "watch.new: Extra inputs are not permitted"),
    "another phase": (lambda note: note.update(phase="halved"), "phase: Input should be 'training'"),
    "a later format": (lambda note: note.update(format=FORMAT + 1, new=1), f"format {FORMAT + 1}, .* up to {FORMAT};"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_note_of_another_version_is_one_line_before_training(
    copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sequence, "train_task", lambda *_, **__: pytest.fail("trained"))
    change, words = REFUSED[name]
    edit(copy, change)
    with pytest.raises(UserError, match=rf"^checkpoint 1: its note of the run's progress has .*{words}") as caught:
        run(CONTENT, copy, REPLAY)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("go on with the version of jaxcl that wrote it")
    assert (copy / "checkpoints" / "1").is_dir(), "nothing is removed"


def test_commands_refuse_it_in_one_line_too(copy: Path) -> None:
    edit(copy, lambda note: note.pop("fingerprints"))
    options: dict[str, Any] = {"max_new_tokens": 3, "temperature": 0.0, "top_p": 1.0, "seed": 0, "raw": False}
    with pytest.raises(UserError, match="fingerprints: Field required"):
        generate_text(str(copy), "a", **options)


def test_a_position_of_another_version_is_one_line(copy: Path) -> None:
    place = next((copy / "checkpoints" / "1" / "data").glob("process_*"))
    for position in ('{"x": 1}', '{"next_index": "a"}', "[3]", '"a"', "7"):
        place.write_text(position)
        write_checksums(copy / "checkpoints" / "1")
        with pytest.raises(UserError, match=r"^the checkpoint's position in the data cannot be used") as caught:
            run(CONTENT, copy, REPLAY)
        assert "\n" not in str(caught.value)


def older(note: dict[str, Any]) -> None:
    """A note as it was before there were formats, stores, timing and some results."""
    for name in ("format", "stores", "timing", "tasks", "watch"):
        note.pop(name, None)
    for name in ("skipped", "spikes", "rewinds", "kinds", "timing", "attempts"):
        note["results"].pop(name, None)


def test_older_notes_are_read(copy: Path, stopped: Path, tmp_path: Path) -> None:
    edit(copy, older)
    results = run(CONTENT, copy, REPLAY)
    assert results.finished
    whole = Path(shutil.copytree(stopped, tmp_path / "whole"))
    assert run(CONTENT, whole, REPLAY).matrix == results.matrix


def test_what_is_written_is_read_and_has_a_format(stopped: Path) -> None:
    with Checkpoints.reading(stopped / "checkpoints") as checkpoints:
        found = checkpoints.notes()
    assert [note_of(saved).phase for saved in found] == ["learned", "training"]
    for saved in found:
        assert saved.progress["format"] == FORMAT
        assert note_of(Saved(0, note_of(saved).model_dump())) == note_of(saved)
