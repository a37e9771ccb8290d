"""Whole runs with batches that are not finite: they go back to a checkpoint, to the bit, or end with one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.same_runs import last_arrays
from jaxcl.data.pipeline import Pipeline
from jaxcl.errors import UserError
from jaxcl.reporting.report import write_report
from jaxcl.run import sequence
from jaxcl.run.rewinding import order_seed
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import PAIRS, SEEKR, numbers, run

# One task of eight steps, with checkpoints after steps 2, 4 and 6, beside that before the first step.
ALONE: dict[str, Any] = {
    **PAIRS,
    "tasks": [{**PAIRS["tasks"][0], "test": 2}],
    "training": {"batch_size": 8, "steps": 8, "log_every": 1, "checkpoint_every": 2, "max_skipped": 2},
    "evaluation": {"batch_size": 4, "max_new_tokens": 24},
}


class Poison:
    """Makes a weight of the batches at some places NaN, in the order that a task begins with or in every order."""

    def __init__(self) -> None:
        self.places: set[int] = set()
        self.seed: int | None = 0

    def set(self, *places: int, seed: int | None = 0) -> None:
        self.places, self.seed = set(places), seed


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poison]:
    poison, batch_at = Poison(), Pipeline.batch_at

    def poisoned(self: Any, step: int, *, seed: int, **where: int) -> Any:
        batch = batch_at(self, step, seed=seed, **where)
        if step in poison.places and poison.seed in (None, seed) and self.origin == "task":
            batch["weights"] = np.full_like(batch["weights"], np.nan)
        return batch

    monkeypatch.setattr(Pipeline, "batch_at", poisoned)
    return poison


def same(one: Path, other: Path) -> None:
    assert numbers(one) == numbers(other)
    arrays, others = last_arrays(one / "checkpoints"), last_arrays(other / "checkpoints")
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


def test_a_task_goes_back_and_on_in_another_order_also_after_a_kill(
    tmp_path: Path, poison: Poison, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison.set(0, 4, 5)  # steps 1, 5 and 6
    results = run(ALONE, tmp_path / "whole", "sequential")
    assert "at steps 5 to 6 of 8" in (said := capsys.readouterr().err)
    assert "going on from step 4 of it (checkpoint 2) with another order" in said
    assert (results.skipped, results.rewinds) == ({"direction": 1}, {"direction": 1})
    assert 0 < results.timing["lost"] < results.timing["training"] + results.timing["lost"]
    assert [row["step"] for row in numbers(tmp_path / "whole")] == list(range(1, 9)), "no step twice, none missing"
    assert [row["skipped"] for row in numbers(tmp_path / "whole")] == [1, 0, 0, 0, 0, 0, 0, 0]

    # Killed after the checkpoint at step 6, which the new order has reached, and within the steps it goes back from.
    with killed_at_save(4):
        run(ALONE, tmp_path / "killed", "sequential")
    assert run(ALONE, tmp_path / "killed", "sequential").rewinds == {"direction": 1}
    same(tmp_path / "whole", tmp_path / "killed")

    # What it must be equal to: a run that stopped at step 4 and goes on from there in that order.
    poison.set(0)
    with killed_at_save(3):
        run(ALONE, tmp_path / "given", "sequential")
    monkeypatch.setattr(sequence, "order_seed", lambda seed, rewinds: order_seed(seed, 1))
    assert run(ALONE, tmp_path / "given", "sequential").rewinds == {"direction": 0}
    same(tmp_path / "whole", tmp_path / "given")


@pytest.mark.slow
def test_a_later_task_without_a_checkpoint_of_its_own_begins_again(
    tmp_path: Path, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {**PAIRS, "training": {**PAIRS["training"], "checkpoint_every": 0, "max_skipped": 2}}
    poison.set(1, 2, seed=1)
    results = run(content, tmp_path / "whole", SEEKR)
    assert results.rewinds == {"direction": 0, "category": 1}
    poison.set()
    with killed_at_save(2):  # after the first task
        run(content, tmp_path / "given", SEEKR)
    monkeypatch.setattr(sequence, "order_seed", lambda seed, rewinds: order_seed(seed, 1))
    assert run(content, tmp_path / "given", SEEKR).matrix == results.matrix
    same(tmp_path / "whole", tmp_path / "given")


@pytest.mark.parametrize(
    ("changes", "backs", "steps"),
    [({}, 1, "steps 5 to 6"), ({"max_rewinds": 0}, 0, "steps 5 to 6"), ({"max_skipped": 0}, 0, "step 5")],
)
def test_without_an_end_it_stops_with_one_line(
    tmp_path: Path,
    poison: Poison,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, int],
    backs: int,
    steps: str,
) -> None:
    poison.set(4, 5, seed=None)
    content = {**ALONE, "training": {**ALONE["training"], **changes}}
    with pytest.raises(UserError, match=f"task direction: loss is nan at {steps} of 8.*learning_rate"):
        run(content, tmp_path / "run", "sequential")
    assert capsys.readouterr().err.count("another order") == backs
    newest = max(int(folder.name) for folder in (tmp_path / "run/checkpoints").iterdir() if folder.name.isdecimal())
    note = json.loads((tmp_path / "run/checkpoints" / str(newest) / "progress/metadata").read_text())
    assert note["progress"]["watch"]["streak"] == 0, "the last checkpoint lies before what was skipped"


def test_a_run_that_stops_names_the_rows_that_were_in_the_last_steps_of_every_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row is bad: every batch that holds it is not finite, whatever the order."""
    batch_at, read = Pipeline.batch_at, dict[tuple[int, int], list[int]]()
    bad = 3

    def poisoned(self: Any, step: int, *, seed: int, **where: int) -> Any:
        batch = batch_at(self, step, seed=seed, **where)
        if self.origin == "task":
            read[seed, step] = batch["example"].tolist()
            batch["weights"] = np.where((batch["example"] == bad)[:, None], np.nan, batch["weights"])
        return batch

    monkeypatch.setattr(Pipeline, "batch_at", poisoned)
    monkeypatch.setattr(sequence, "write_report", write_report)  # which other tests leave out
    content = {**ALONE, "training": {**ALONE["training"], "max_skipped": 1}}
    with pytest.raises(UserError, match=r"see .*run/report\.html"):
        run(content, tmp_path / "run", "sequential")
    found = json.loads((tmp_path / "run/not_finite.json").read_text())
    assert found["task"] == "direction"
    rows = []
    for order, seed in zip(found["orders"], (0, order_seed(0, 1)), strict=True):
        assert order["first"] == order["last"], "one skipped step is enough here"
        expected = sorted({row for row in read[seed, order["last"] - 1] if row >= 0})
        assert order["rows"] == {"direction": expected}
        assert bad in expected
        rows.append(set(expected))
    assert found["in_all_orders"]["rows"] == {"direction": sorted(rows[0] & rows[1])}
    page = (tmp_path / "run/report.html").read_text()
    assert "Why it stopped" in page
    assert "Rows that were in all orders" in page

    # Mended, the run goes on, and nothing says any more that it stopped.
    monkeypatch.setattr(Pipeline, "batch_at", batch_at)
    assert run(content, tmp_path / "run", "sequential").finished
    assert not (tmp_path / "run/not_finite.json").exists()
    assert "Why it stopped" not in (tmp_path / "run/report.html").read_text()


def test_a_report_that_cannot_be_written_hides_no_reason(
    tmp_path: Path, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise UserError("the disk is full")

    poison.set(4, 5, seed=None)
    monkeypatch.setattr(sequence, "write_report", full)
    content = {**ALONE, "training": {**ALONE["training"], "max_rewinds": 0}}
    with pytest.raises(UserError, match=r"loss is nan at steps 5 to 6 of 8.*; without a report: the disk is full"):
        run(content, tmp_path / "run", "sequential")


def test_the_order_follows_from_seed_and_count_alone() -> None:
    assert order_seed(3, 0) == 3
    assert order_seed(3, 1) == order_seed(3, 1)
    assert len({order_seed(seed, rewinds) for seed in (3, 4) for rewinds in range(4)}) == 8
