"""A few kills of `make chaos`: what the runs leave is what an undisturbed run leaves, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.campaign import Campaign, environment

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "processes", "remote"), [("replay", 1, False), ("seekr", 2, False), ("replay", 1, True)]
)
def test_runs_that_are_killed_end_as_if_they_were_not(
    method: str, processes: int, remote: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    tally = Campaign(method, processes, tmp_path / "runs", remote=remote).run(kills=4, seed=18)
    assert not tally.wrong
    assert tally.kills == sum(tally.phases.values()) == 4
