"""A short round of the fuzzing that `make fuzz` does at length: the same inputs each time."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from tests.fuzz.__main__ import summed
from tests.fuzz.harness import Counts, Target, feed
from tests.fuzz.mutate import mutants
from tests.fuzz.targets import TARGETS
from tests.records import append

INPUTS = 200


@pytest.mark.parametrize("name", TARGETS)
def test_odd_bytes_end_in_a_documented_error(name: str) -> None:
    target, counts = TARGETS[name], Counts()
    for content in islice(mutants(target.seeds(), 18), INPUTS // target.weight):
        feed(target, content, counts)
    assert counts.inputs == INPUTS // target.weight
    assert counts.read, "the seeds are of no use"
    assert not counts.crashes, "\n".join(f"{content[:300]!r}\n{lines}" for content, lines in counts.crashes.values())


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
