"""A process of a campaign kills itself at the given point and notes the phase of the run."""

from __future__ import annotations

import multiprocessing
import time
from functools import partial
from pathlib import Path

import pytest

from tests.chaos.member import Doom, member


# Three operations, since the folder above is missing at first, then ten, then ten more.
def train_task(folder: Path) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    for number in range(10):
        (folder / f"checkpoints/{number}").touch()
    while not (folder.parent / "go on").exists():
        time.sleep(0.01)


def _evaluate(folder: Path) -> None:
    for number in range(10):
        (folder / f"{number}").touch()


def pretend(folder: Path) -> int:
    train_task(folder)
    _evaluate(folder)
    return 0


@pytest.mark.parametrize(
    ("doom", "code", "note", "files"),
    [
        (None, 0, "23", (10, 11)),
        (Doom("file", 8), -9, "checkpoint", (4, 1)),
        (Doom("file", 16), -9, "evaluation", (10, 3)),
        (Doom("file", 99), 0, "23", (10, 11)),
        (Doom("time", 0.5), -9, "training", (10, 1)),
    ],
)
def test_it_dies_before_a_file_operation_or_after_a_time(
    doom: Doom | None, code: int, note: str, files: tuple[int, int], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    if doom is None or doom.kind == "file":
        (tmp_path / "go on").touch()
    process = multiprocessing.get_context("forkserver").Process(
        target=member,
        args=(str(folder), doom, str(tmp_path / "note")),
        kwargs={"command": partial(pretend, folder), "environment": {}},
    )
    process.start()
    process.join()
    assert process.exitcode == code, (tmp_path / "note.log").read_text()
    assert (tmp_path / "note").read_text() == note
    assert (len(list((folder / "checkpoints").iterdir())), len(list(folder.iterdir()))) == files
