"""Uploads of a run in the background: each state when its checkpoint is complete, and what becomes of errors."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from jaxcl.errors import UserError
from jaxcl.run.remote import claim
from jaxcl.run.remote.mirror import Mirror
from jaxcl.run.remote.objects import Objects
from jaxcl.run.remote.reading import read_states
from jaxcl.run.remote.uploads import Uploads
from tests.tiny.storage import FaultySystem

Storage = type[FaultySystem]
URL = "faulty://bucket/run"


def checkpoint(local: Path, number: int, *, removed: int | None = None) -> None:
    """As the run's checkpoints do it: it appears in one piece; then an older one is removed."""
    coming = local / f"checkpoints/{number}.orbax-checkpoint-tmp"
    coming.mkdir(parents=True)
    (coming / "a").write_text(f"params {number}")
    coming.rename(local / f"checkpoints/{number}")
    if removed is not None:
        (local / f"checkpoints/{removed}/a").unlink()
        (local / f"checkpoints/{removed}").rmdir()


def names() -> list[set[str]]:
    """The files of the states at the URL, the newest first."""
    return [set(state.files) for state in read_states(Objects(URL)).states]


def test_a_state_waits_for_its_checkpoint(storage: Storage, tmp_path: Path) -> None:
    with Uploads() as uploads:
        uploads.open(URL, tmp_path)
        (tmp_path / "config.yaml").write_text("config")
        uploads.stage()
        uploads.submit(0)
        (tmp_path / "results.json").write_text("later")
        assert not names()
        checkpoint(tmp_path, 0)
    assert names() == [{"config.yaml", "checkpoints/0/a"}]
    assert not any((tmp_path / ".mirror").iterdir())


def slowed(storage: Storage) -> tuple[threading.Event, threading.Event]:
    """Lets the first checkpoint's upload wait; the first event says that it does, the second lets it go on."""
    waits, go_on = threading.Event(), threading.Event()

    def wait(number: int, place: str) -> None:
        if "checkpoints/0/a" in place:
            waits.set()
            go_on.wait(60)

    storage.fault = staticmethod(wait)
    return waits, go_on


def test_a_state_that_waits_gives_way_to_a_newer_one(storage: Storage, tmp_path: Path) -> None:
    slow, go_on = slowed(storage)
    with Uploads() as uploads:
        uploads.open(URL, tmp_path)
        uploads.stage()
        uploads.submit(0)
        checkpoint(tmp_path, 0)
        assert slow.wait(60)
        for number in (1, 2):
            uploads.stage()
            uploads.submit(number)
            checkpoint(tmp_path, number, removed=number - 1)
        go_on.set()
    assert names() == [{"checkpoints/1/a", "checkpoints/2/a"}, {"checkpoints/0/a"}]
    assert not any((tmp_path / ".mirror").iterdir())


def test_a_checkpoint_that_waits_for_its_upload_may_be_removed(storage: Storage, tmp_path: Path) -> None:
    slow, go_on = slowed(storage)
    with Uploads() as uploads:
        uploads.open(URL, tmp_path)
        for number in (0, 1):
            uploads.stage()
            uploads.submit(number)
            checkpoint(tmp_path, number)
            assert slow.wait(60)
        uploads.stage()
        checkpoint(tmp_path, 2, removed=1)  # before it is submitted, and it never is
        go_on.set()
    assert names()[0] == {"checkpoints/0/a", "checkpoints/1/a"}


def test_a_checkpoint_that_never_comes_is_not_waited_for(storage: Storage, tmp_path: Path) -> None:
    with Uploads() as uploads:
        uploads.open(URL, tmp_path)
        uploads.stage()
        uploads.submit(0)  # and then the disk was full
    assert not names()
    assert not storage.store  # nor its claim


def test_an_upload_that_fails_is_said_once_and_tried_with_the_next_checkpoint(
    storage: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(number: int, place: str) -> None:
        if "/files/" in place:
            raise OSError("quota exceeded")

    with Uploads() as uploads:
        uploads.open(URL, tmp_path)
        storage.fault = staticmethod(refuse)
        (tmp_path / "config.yaml").write_text("config")
        with pytest.raises(UserError, match=r"quota exceeded; the run is whole in .*, run it again to upload it"):
            uploads.finish()
        for number in (0, 1):
            uploads.stage()
            uploads.submit(number)
            checkpoint(tmp_path, number)
            with uploads._changed:
                uploads._changed.wait_for(lambda: not uploads._busy and uploads._waiting is None)
        said = capsys.readouterr().err.splitlines()
        assert all("quota exceeded; the run goes on, and tries again with its next checkpoint" in line for line in said)
        assert 1 <= len(said) == len(set(said))
        storage.fault = staticmethod(lambda number, place: None)
        uploads.stage()
        uploads.submit(2)
        checkpoint(tmp_path, 2)
    assert names() == [{"config.yaml", "checkpoints/0/a", "checkpoints/1/a", "checkpoints/2/a"}]


def test_a_run_that_was_overtaken_ends_before_its_next_checkpoint(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim.Claim, "_renew", lambda self: None)  # paused, or cut off
    with Uploads() as uploads:
        uploads.open(URL, tmp_path / "one")
        monkeypatch.setattr(claim, "_machine", lambda: "another one")
        other = Mirror(URL, tmp_path / "two")
        other.open()
        uploads.stage()
        uploads.submit(0)
        checkpoint(tmp_path / "one", 0)
        with uploads._changed:
            uploads._changed.wait_for(lambda: not uploads._busy and uploads._waiting is None)
        with pytest.raises(claim.Overtaken, match="is running here"):
            uploads.stage()
    assert not names()
