"""A process of a campaign kills itself at the given point and notes the phase of the run."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from tests.chaos.__main__ import summed
from tests.chaos.campaign import Tally, table
from tests.chaos.member import Doom, member
from tests.records import append


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


def test_kills_of_several_rounds_add_up(tmp_path: Path) -> None:
    about = {"method": "das", "processes": 2, "storage": "url", "seed": 1}
    one = Tally(kills=3, runs=1, phases=Counter({"upload": 2, "training": 1}), alone=1, seconds=30.0, wrong=[])
    other = Tally(kills=1, runs=1, phases=Counter({"upload": 1}), seconds=30.0, wrong=["run2: metrics.jsonl"])
    for tally in (one, other):
        append(tmp_path, {**about, **tally.plain()})
    append(tmp_path, {**about, "processes": 1, "storage": "folder", **one.plain()})
    said: list[str] = []
    table(summed(tmp_path), said.append)
    assert said[0] == (
        "| run | kills | runs ended | ended alone | training | upload | differences | kills per minute |"
    )
    assert said[2:] == [
        "| das, 1 process, folder | 3 | 1 | 1 | 1 | 2 | 0 | 6.0 |",
        "| das, 2 processes, url | 4 | 2 | 1 | 1 | 3 | 1 | 4.0 |",
        "| all | 7 | 3 | 2 | 2 | 5 | 1 | 4.7 |",
    ]
    assert json.loads(next(tmp_path.glob("*.jsonl")).read_text().splitlines()[0])["commit"]
