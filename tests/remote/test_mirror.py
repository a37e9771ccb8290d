"""States of a folder at a URL: whole or not there, whatever happens to the writer, the network and the objects."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxcl.errors import UserError
from jaxcl.run.remote import claim
from jaxcl.run.remote.mirror import Mirror
from jaxcl.run.remote.objects import Objects
from jaxcl.run.remote.reading import read_states
from jaxcl.run.remote.state import File, State, names_in
from tests.tiny.storage import FaultySystem, Killed

Storage = type[FaultySystem]
URL = "faulty://bucket/run"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in names_in(folder)}


FIRST = {
    "config.yaml": "config",
    "metrics.jsonl": "1\n",
    "checkpoints/0/params/a": "zero",
    "checkpoints/0/.zarray": "z",
}
SECOND = {"config.yaml": "config", "metrics.jsonl": "1\n2\n", "checkpoints/1/params/a": "one", "memory/x": "rows"}
THIRD = {"config.yaml": "config", "metrics.jsonl": "1\n2\n3\n", "checkpoints/2/params/a": "two", "memory/x": "rows"}


def become(folder: Path, files: dict[str, str]) -> None:
    """Makes the folder hold these files alone, as a run does: it removes old checkpoints, and adds to files."""
    for name in list(names_in(folder)):
        if name not in files:
            (folder / name).unlink()
    write(folder, {name: text for name, text in files.items() if not (folder / name).exists() or "/" not in name})


@contextmanager
def opened(local: Path, url: str = URL) -> Iterator[Mirror]:
    mirror = Mirror(url, local)
    mirror.open()
    try:
        yield mirror
    finally:
        mirror._claim._stop.set()  # a process that dies renews nothing
        FaultySystem.fault = staticmethod(lambda number, place: None)
        mirror.close()


def put(local: Path, files: dict[str, str], url: str = URL) -> None:
    with opened(local, url) as mirror:
        become(local, files)
        mirror.upload(mirror.stage())


def taken_down(local: Path, url: str = URL) -> dict[str, str]:
    with opened(local, url):
        return read(local)


def test_a_folder_that_is_lost_comes_back_whole(storage: Storage, tmp_path: Path) -> None:
    for files in (FIRST, SECOND):
        put(tmp_path / "one", files)
    (tmp_path / "one/.lock").touch()
    assert taken_down(tmp_path / "two") == SECOND
    assert (tmp_path / "two/metrics.jsonl").stat().st_mtime == (tmp_path / "one/metrics.jsonl").stat().st_mtime


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_it_works_on_file_systems_of_fsspec(scheme: str, storage: Storage, tmp_path: Path) -> None:
    url = f"{scheme}://{tmp_path}/bucket/run/"
    for files in (FIRST, SECOND, THIRD):
        put(tmp_path / "one", files, url)
    assert taken_down(tmp_path / "two", url) == THIRD
    assert [state.number for state in read_states(Objects(url)).states] == [3, 2]
    assert "claim.json" not in Objects(url).names("")


def test_the_folder_before_the_checkpoint_is_what_is_kept(storage: Storage, tmp_path: Path) -> None:
    """What the run does after it was staged changes nothing; a checkpoint that is complete by then is added."""
    local = tmp_path / "one"
    with opened(local) as mirror:
        become(local, FIRST)
        stage = mirror.stage()
        become(
            local,
            {
                **THIRD,
                ".memory.json.x.tmp": "x",
                "results.json.partial": "x",
                "checkpoints/3.orbax-checkpoint-tmp/a": "x",
            },
        )
        mirror.add(stage, 2)
        mirror.upload(stage)
        assert not stage.exists()
    assert taken_down(tmp_path / "two") == {**FIRST, "checkpoints/2/params/a": "two"}
    with opened(local) as mirror:
        mirror.upload(mirror.stage())
    assert taken_down(tmp_path / "three") == THIRD  # nothing that is not finished


def test_killed_at_any_write_what_is_there_is_one_of_two_whole_states(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_lives", lambda process: False)  # who was killed
    monkeypatch.setattr(claim.Claim, "_renew", lambda self: None)  # so that the number of writes is the same each time
    put(tmp_path / "begin", FIRST)
    put(tmp_path / "begin", SECOND)
    before = {place: file.getvalue() for place, file in storage.store.items()}
    storage.writes.clear()
    put(tmp_path / "begin", THIRD)
    writes = len(storage.writes)
    assert writes >= 4  # the claim, two files and the state
    found = []
    for number in range(1, writes + 1):
        for arrived in (None, 3) if number < writes else (None, 3, 10**6):
            storage.reset()
            FaultySystem(skip_instance_cache=True).pipe(before)
            storage.writes.clear()
            local = tmp_path / f"{number}-{arrived}"

            def die(count: int, place: str, at: int = number, arrived: int | None = arrived) -> None:
                if count >= at:
                    raise Killed(arrived if count == at else None)

            storage.fault = staticmethod(die)
            with pytest.raises(Killed):
                put(local, THIRD)
            storage.fault = staticmethod(lambda number, place: None)
            found.append(taken_down(tmp_path / f"{local.name}-after"))
            assert found[-1] in (SECOND, THIRD)
            # The folder of the run that was killed is as new or newer: it goes on there.
            if (local / "config.yaml").exists():
                assert taken_down(local) in (found[-1], THIRD)
                put(local, THIRD)
                assert taken_down(tmp_path / f"{local.name}-end") == THIRD
                shutil.rmtree(tmp_path / f"{local.name}-end")
    assert SECOND in found
    assert THIRD in found


def test_leftovers_and_old_states_are_removed(storage: Storage, tmp_path: Path) -> None:
    for files in (FIRST, SECOND):
        put(tmp_path / "one", files)
    FaultySystem(skip_instance_cache=True).pipe_file(
        "/bucket/run/files/checkpoints/9/a.00", b"of a run that was killed"
    )
    put(tmp_path / "one", THIRD)
    names = sorted(place.removeprefix("/bucket/run/") for place in storage.store)
    assert [name.rpartition(".")[0] for name in names if name.startswith("files/")] == [
        "files/checkpoints/1/params/a",
        "files/checkpoints/2/params/a",
        "files/config.yaml",
        "files/memory/x",
        "files/metrics.jsonl",
        "files/metrics.jsonl",
    ]
    assert [name for name in names if not name.startswith("files/")] == [
        "states/00000002.json",
        "states/00000003.json",
    ]


@pytest.mark.parametrize("what", ["states/00000003.json", "checkpoints/2/params/a", "metrics.jsonl"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_object_is_named_and_the_state_before_it_used(
    what: str, how: str, storage: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for files in (FIRST, SECOND, THIRD):
        put(tmp_path / "one", files)
    if what == "metrics.jsonl":  # both states have one
        digest = next(one.digest for name, one in states(storage)[-1].files.items() if name == what)
        what = f"metrics.jsonl.{digest[:32]}"
    if how == "gone":
        del storage.store[storage.place(what)]
    else:
        storage.change(what, b"{" if how == "cut" else None)
    assert taken_down(tmp_path / "two") == SECOND
    said = capsys.readouterr().err
    if (what, how) != ("states/00000003.json", "gone"):
        assert f"{URL}/" in said
        assert what in said
        assert f"{'is missing' if how == 'gone' else 'is damaged'}; state 2 is used" in said
    put(tmp_path / "two", THIRD)
    assert taken_down(tmp_path / "three") == THIRD


def states(storage: Storage) -> list[State]:
    found = sorted(place for place in storage.store if "/states/" in place)
    return [State.decode(storage.store[place].getvalue(), place) for place in found]


def test_without_a_whole_state_it_is_an_error(storage: Storage, tmp_path: Path) -> None:
    for files in (SECOND, THIRD):
        put(tmp_path / "one", files)
    storage.change("config.yaml")
    with pytest.raises(UserError, match=r"config.yaml.\w+ is damaged; no state of faulty://bucket/run is whole"):
        taken_down(tmp_path / "two")
    for number in (1, 2):
        storage.change(f"states/0000000{number}.json")
    with pytest.raises(UserError, match=r"states/00000002.json is damaged; no state of faulty://bucket/run is whole"):
        taken_down(tmp_path / "three")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ".lock", "a//b", "a\\b", ""])
def test_a_state_names_nothing_outside_the_folder(name: str) -> None:
    state = State(1, "id", {name: File(1, "0" * 64, 0.0)})
    with pytest.raises(UserError, match="is not a file of a run folder"):
        State.decode(state.encode(), "it")


def test_what_no_state_names_is_removed_from_the_folder(storage: Storage, tmp_path: Path) -> None:
    put(tmp_path / "one", FIRST)
    put(tmp_path / "two", SECOND)
    write(tmp_path / "one", {"checkpoints/7/params/a": "of nobody"})  # the folder is older than the URL now
    assert taken_down(tmp_path / "one") == SECOND
    assert not (tmp_path / "one/checkpoints/7").exists()


def test_a_newer_folder_is_kept(storage: Storage, tmp_path: Path) -> None:
    put(tmp_path / "one", FIRST)
    become(tmp_path / "one", SECOND)  # not uploaded: the machine went away, and is back
    assert taken_down(tmp_path / "one") == SECOND


def test_a_folder_of_something_else_is_not_touched(storage: Storage, tmp_path: Path) -> None:
    put(tmp_path / "one", FIRST)
    write(tmp_path / "two", {"thesis.tex": "years of work"})
    with pytest.raises(UserError, match="contains files that are not from faulty://bucket/run"):
        taken_down(tmp_path / "two")
    with pytest.raises(UserError, match="is the local folder of faulty://bucket/run; name another local_output"):
        put(tmp_path / "one", THIRD, "faulty://bucket/other")
    assert read(tmp_path / "two") == {"thesis.tex": "years of work"}


def test_a_download_that_was_killed_is_done_again(storage: Storage, tmp_path: Path) -> None:
    put(tmp_path / "one", THIRD)

    def die(place: str) -> None:
        if "memory/x" in place:
            raise Killed

    storage.reading = staticmethod(die)
    with pytest.raises(Killed):
        taken_down(tmp_path / "two")
    storage.reading = staticmethod(lambda place: None)
    assert taken_down(tmp_path / "two") == THIRD


def test_faults_that_pass_are_not_noticed(storage: Storage, tmp_path: Path) -> None:
    failed, cut = set[str](), set[str]()

    def shorten(number: int, place: str) -> int | None:
        if place in cut:
            return None
        cut.add(place)
        return 0

    def hesitate(place: str) -> None:
        if place not in failed:
            failed.add(place)
            raise OSError(errno.ECONNRESET, "connection reset")

    mirror = Mirror(URL, tmp_path / "one")
    storage.fault, storage.reading, storage.latency = staticmethod(shorten), staticmethod(hesitate), 0.01
    mirror.open()
    become(tmp_path / "one", THIRD)
    mirror.upload(mirror.stage())
    mirror.close()
    failed.clear()
    assert taken_down(tmp_path / "two") == THIRD


def test_faults_that_last_are_one_line(storage: Storage, tmp_path: Path) -> None:
    def refuse(number: int, place: str) -> None:
        if "/files/" in place:
            raise PermissionError(errno.EACCES, "no right to write")

    with opened(tmp_path / "one") as mirror:
        become(tmp_path / "one", FIRST)
        storage.fault = staticmethod(refuse)
        storage.writes.clear()
        with pytest.raises(UserError, match=r"cannot write faulty://bucket/run/files/.*: no right to write"):
            mirror.upload(mirror.stage())
        assert len({place for place in storage.writes if "/files/" in place}) == len(
            [place for place in storage.writes if "/files/" in place]
        )  # no second attempt
    assert not states(storage)


def test_less_than_was_sent_is_noticed(storage: Storage, tmp_path: Path) -> None:
    with opened(tmp_path / "one") as mirror:
        become(tmp_path / "one", FIRST)
        storage.fault = staticmethod(lambda number, place: 2 if "config.yaml" in place else None)
        with pytest.raises(UserError, match=r"cannot write .*config.yaml.*: 2 bytes of 6 arrived"):
            mirror.upload(mirror.stage())
    assert not states(storage)


def test_two_runs_at_one_url(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path / "one"):
        with pytest.raises(UserError, match=r"output faulty://bucket/run: process \d+ on .* is running here"):
            taken_down(tmp_path / "two")
        monkeypatch.setattr(claim, "_machine", lambda: "another one")  # where processes cannot be looked up
        with pytest.raises(UserError, match=r"output faulty://bucket/run: process \d+ on .* is running here"):
            taken_down(tmp_path / "two")
    assert "claim.json" not in " ".join(storage.store)


def test_half_a_claim_is_not_that_of_another_run(storage: Storage, tmp_path: Path) -> None:
    with opened(tmp_path / "one") as mirror:
        mirror._claim._stop.set()
        storage.change("claim.json", b'{"ident')
        mirror._claim.check()


def test_a_claim_that_is_not_renewed_is_taken_over(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = Mirror(URL, tmp_path / "one")
    mirror.open()
    mirror._claim._stop.set()  # paused, or cut off
    assert mirror._claim._thread is not None
    mirror._claim._thread.join()
    become(tmp_path / "one", FIRST)
    monkeypatch.setattr(claim, "_machine", lambda: "another one")
    with opened(tmp_path / "two") as other:
        assert "looking for 0.06 s whether it still is" in capsys.readouterr().err
        with pytest.raises(claim.Overtaken):
            mirror.upload(mirror.stage())
        mirror.close()
        become(tmp_path / "two", SECOND)
        other.upload(other.stage())
    assert taken_down(tmp_path / "three") == SECOND
