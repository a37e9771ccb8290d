"""A short round of the fuzzing that `make fuzz` does at length: the same inputs each time."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tests import records
from tests.fuzz import harness
from tests.fuzz.__main__ import main, summed
from tests.fuzz.harness import Counts, Target, feed
from tests.fuzz.mutate import MOST, mutants
from tests.fuzz.targets import KNOWN, TARGETS
from tests.records import append

INPUTS = 200
# Ten times what a round of `make fuzz` allows: other tests run beside these.
PATIENCE = 10


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SECONDS", PATIENCE * harness.SECONDS)


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("name", TARGETS)
def test_odd_bytes_end_in_a_documented_error(name: str) -> None:
    target = patient(TARGETS[name])
    seeds = target.seeds()
    assert max(map(len, seeds)) < MOST, "changes of what is behind would be cut"
    counts = Counts(seeds=set(seeds))
    for content in islice(mutants(seeds, 18), INPUTS // target.weight):
        feed(target, content, counts)
    assert counts.inputs == INPUTS // target.weight
    assert counts.read > counts.changed, "the seeds are of no use"
    assert counts.changed, "no changed input could be read: nothing behind the first check was tried"
    assert not counts.crashes, "\n".join(f"{content[:300]!r}\n{lines}" for content, lines in counts.crashes.values())


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("name", KNOWN)
def test_inputs_that_once_crashed_end_in_a_documented_error(name: str) -> None:
    target, counts = patient(TARGETS[name]), Counts()
    for content in (target.seeds()[0], *KNOWN[name]()):
        feed(target, content, counts)
    assert counts.read, "the seeds are of no use"
    assert not counts.crashes, "\n".join(f"{content[:300]!r}\n{lines}" for content, lines in counts.crashes.values())


def patient(target: Target) -> Target:
    return dataclasses.replace(target, waits=PATIENCE * target.waits)


def test_a_crash_and_a_hang_are_noticed() -> None:
    def read(content: bytes, folder: object) -> None:
        if content == b"crash":
            raise KeyError
        while content == b"hang":
            pass

    counts = Counts()
    for content in (b"fine", b"crash", b"crash", b"hang"):
        feed(Target(read, lambda: []), content, counts)
    assert (counts.inputs, counts.read) == (4, 1)
    assert sorted(counts.crashes) == ["Hang at outside", "KeyError at outside"]


def test_who_waits_without_an_end_or_takes_too_much_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux: elsewhere, memory is not limited."""
    monkeypatch.setattr(harness, "MEMORY", 2**23)
    monkeypatch.setattr(harness, "_SPACE", 2**28)

    def read(content: bytes, folder: object) -> None:
        if content == b"waits":
            threading.Event().wait()
        size = {b"much": 2**24, b"far too much": 2**40}.get(content, 0)
        np.ones(size, np.uint8)

    target = Target(read, lambda: [], waits=1.0)
    counts = Counts(inputs=1)
    for content in (b"fine", b"waits", b"much", b"far too much"):
        feed(target, content, counts)
    assert (counts.inputs, counts.read) == (5, 2)
    assert sorted(counts.crashes) == ["Hang at outside", "MemoryError at outside", "TooLarge at outside"]


def test_a_target_whose_readers_are_never_reached_fails_a_long_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"inputs": 900, "read": 3, "changed": 0, "seconds": 1.0, "line": "parquet 900", "crashes": []}

    def one(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (tmp_path / "parquet" / "counts.json").write_text(json.dumps(counts))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", one)
    monkeypatch.setattr(records, "_commit", lambda: "x")
    monkeypatch.setattr("sys.argv", ["fuzz", "parquet", "--out", str(tmp_path), "--record", str(tmp_path / "record")])
    assert main() == 1
    assert "parquet 900  no changed input could be read" in capsys.readouterr().out
    counts["changed"] = 1
    assert main() == 0


def test_inputs_of_several_rounds_add_up(tmp_path: Path) -> None:
    line = {"read": 1, "crashes": [], "seconds": 2.0, "ended": ""}
    for inputs in (10, 30):
        append(tmp_path, {"reader": "gguf", "inputs": inputs, **line})
    append(
        tmp_path, {"reader": "chat", "inputs": 5_000, **line, "crashes": ["KeyError at x"], "ended": "ended with 77"}
    )
    assert list(summed(tmp_path))[2:] == [
        "| chat | 5,000 | 1 | 2 | 2,500 |",
        "| gguf | 40 | 2 | 0 | 10 |",
        "| all | 5,040 | 3 | 2 | 840 |",
    ]


def test_mutants_follow_from_the_seed() -> None:
    seeds = [b'{"a": [1, 2, {"b": "c"}]}', b"plain text"]
    first, again, other = (list(islice(mutants(seeds, number), 300)) for number in (1, 1, 2))
    assert first == again != other
    assert first[:2] == seeds
    assert len(set(first)) > 200
