"""A few kills of `make chaos`: what the runs leave is what an undisturbed run leaves, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.campaign import Campaign, environment


@pytest.mark.parametrize(
    ("method", "processes", "remote", "kills"),
    [
        ("replay", 1, False, 2),
        pytest.param("replay", 1, False, 4, marks=pytest.mark.slow),
        pytest.param("seekr", 2, False, 4, marks=pytest.mark.slow),
        pytest.param("replay", 1, True, 4, marks=pytest.mark.slow),
    ],
)
def test_runs_that_are_killed_end_as_if_they_were_not(
    method: str, processes: int, remote: bool, kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    tally = Campaign(method, processes, tmp_path / "runs", remote=remote).run(kills=kills, seed=18)
    assert not tally.wrong
    assert tally.kills == sum(tally.phases.values()) == kills
