"""A private run, from the configuration to its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxcl.errors import UserError
from jaxcl.reporting.report import write_report
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import PAIRS, numbers, run

PRIVACY = {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3}
PRIVATE: dict[str, Any] = {**PAIRS, "training": {**PAIRS["training"], "privacy": PRIVACY}}


@pytest.mark.slow
def test_results_say_what_each_task_has_told(tmp_path: Path) -> None:
    results = run(PRIVATE, tmp_path / "private", "sequential")
    content = json.loads((tmp_path / "private" / "results.json").read_text())["extra"]["privacy"]
    assert results.finished
    assert set(content) == {"epsilon", "epsilon_poisson"}
    assert list(content["epsilon"]) == results.tasks
    assert all(0 < value < 100 for value in content["epsilon"].values())
    assert "epsilon" in write_report(tmp_path / "private").read_text()


@pytest.mark.slow
def test_what_each_task_has_told_is_the_same_after_stops(tmp_path: Path) -> None:
    run(PRIVATE, tmp_path / "whole", "sequential")
    for number in (2, 2):  # within the first task, then within the second
        with killed_at_save(number):
            run(PRIVATE, tmp_path / "killed", "sequential")
    run(PRIVATE, tmp_path / "killed", "sequential")
    told, again = (
        json.loads((tmp_path / name / "results.json").read_text())["extra"]["privacy"] for name in ("whole", "killed")
    )
    assert told == again
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "killed")


def test_methods_that_keep_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.privacy: replay trains on examples of earlier tasks"):
        run(PRIVATE, tmp_path / "kept", "replay")
