"""Processes that die or hang end the others, with a line that names them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxcl.sharding.clusters import ProcessId
from jaxcl.sharding.peers import EXIT_LOST, Watch
from tests.tiny.devices import flags

RESUME = "; run the same command again to resume"


class Pair:
    """The watches of process 0 and another one, over a real connection; each notes the lines that would end it."""

    def __init__(self, timeout: float) -> None:
        self.links = socket.socketpair()
        self.said: tuple[list[str], list[str]] = ([], [])
        self.watches = [
            Watch(ProcessId("host", 1, 3, index), {1 - index: self.links[index]}, timeout=timeout, end=end.append)
            for index, end in enumerate(self.said)
        ]

    def wait(self, index: int, seconds: float = 10.0) -> list[str]:
        until = time.monotonic() + seconds
        while not self.said[index] and time.monotonic() < until:
            time.sleep(0.01)
        return self.said[index]

    def close(self) -> None:
        for link in self.links:
            link.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with contextlib.closing(Pair(timeout=0.6)) as made:
        yield made


def test_a_connection_that_closes_is_a_death(pair: Pair) -> None:
    pair.watches[0].start()
    pair.links[1].close()
    assert pair.wait(0) == ["process 1 of 3 has died"]


def test_silence_is_a_hang_and_signs_of_life_are_none(pair: Pair) -> None:
    for watch in pair.watches:
        watch.start()
    time.sleep(1.5)
    assert pair.said == ([], [])
    with contextlib.closing(Pair(timeout=0.3)) as alone:
        alone.watches[1].start()
        assert alone.wait(1) == ["process 0 of 3 hangs: no sign of life for 0.3 s"]


def test_who_ends_as_intended_is_not_missed(pair: Pair) -> None:
    pair.watches[0].start()
    pair.watches[1].part()
    pair.links[1].close()
    assert pair.wait(0, seconds=1) == []


def test_who_fails_alone_is_named_after_some_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxcl.sharding.peers._OWN_REASON_SECONDS", 0.4)
    pair.watches[0].start()
    pair.watches[1].leave(3)
    pair.links[1].close()
    assert pair.wait(0, seconds=0.2) == []
    assert pair.wait(0) == ["process 1 of 3 has ended with exit code 3, see its own output"]


def test_process_0_tells_the_others_what_it_sees(pair: Pair) -> None:
    here, there = socket.socketpair()
    with here, there:
        links = {1: pair.links[0], 2: here}
        Watch(ProcessId("host", 1, 3, 0), links, timeout=9, end=pair.said[0].append).start()
        pair.watches[1].start()
        there.close()
        assert pair.wait(1) == ["process 2 of 3 has died"]


def start_two(how: str, folder: Path, patience: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    for index in range(2):
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
            "JAXCL_PEER_TIMEOUT": str(patience),
            "XLA_FLAGS": flags(1),
        }
        script = Path(__file__).with_name("lost_script.py")
        with (folder / f"err{index}").open("w") as errors:
            running.append(
                subprocess.Popen(
                    [sys.executable, str(script), how, str(folder)], env={**os.environ, **settings}, stderr=errors
                )
            )
    return running


def lose(how: str, victim: int, number: signal.Signals | None, folder: Path, patience: int) -> tuple[int, str, float]:
    """Sends a signal to one of two processes: the other's exit code, what it said, and seconds that it took."""
    running = start_two(how, folder, patience)
    try:
        until = time.monotonic() + 120
        while not all((folder / f"up{index}").exists() for index in range(2)):
            assert time.monotonic() < until, (folder / "err0").read_text()
            time.sleep(0.02)
        time.sleep(0.3)
        started = time.monotonic()
        if number is not None:
            running[victim].send_signal(number)
        code = running[1 - victim].wait(timeout=patience + 60)
        return code, (folder / f"err{1 - victim}").read_text(), time.monotonic() - started
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("how", "victim"),
    [
        ("collective", 1),
        pytest.param("collective", 0, marks=pytest.mark.slow),
        ("alone", 0),
        pytest.param("alone", 1, marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_ends_the_other_at_once_with_one_line(how: str, victim: int, tmp_path: Path) -> None:
    line = f"jaxcl: process {victim} of 2 has died{RESUME}"
    code, said, seconds = lose(how, victim, signal.SIGKILL, tmp_path, 60)
    lines = plain(said)
    # With process 0 jax's service is gone as well: on a busy machine, its words may be out before ours.
    assert (code, [one for one in lines if victim or one == line]) == (EXIT_LOST, [line]), said
    assert seconds < 10


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["alone", pytest.param("collective", marks=pytest.mark.slow)])
def test_a_stopped_process_ends_the_other_after_the_stated_time(how: str, victim: int, tmp_path: Path) -> None:
    code, said, seconds = lose(how, victim, signal.SIGSTOP, tmp_path, 4)
    assert (code, plain(said)) == (
        EXIT_LOST,
        [f"jaxcl: process {victim} of 2 hangs: no sign of life for 4 s{RESUME}"],
    ), said
    assert 3 < seconds < 10


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_while_python_computes_there_is_a_line_too(victim: int, tmp_path: Path) -> None:
    # jax's own words come before it or around it, since the thread that watches waits for the main thread.
    code, said, seconds = lose("busy", victim, signal.SIGKILL, tmp_path, 60)
    assert (code, said.count(f"jaxcl: process {victim} of 2 has died{RESUME}\n")) == (EXIT_LOST, 1), said
    assert seconds < 10


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_the_other(tmp_path: Path) -> None:
    code, said, seconds = lose("end", 1, None, tmp_path, 60)
    ended = f"jaxcl: process 1 of 2 has ended with exit code 1, see its own output{RESUME}"
    assert (code, plain(said)) == (EXIT_LOST, [ended]), said
    assert (tmp_path / "err1").read_text().splitlines()[-1] == "jaxcl run: no luck"
    assert seconds < 20


def plain(said: str) -> list[str]:
    """The lines of jaxcl; a run of several processes on CPU begins with a line of Gloo's."""
    return [line for line in said.splitlines() if not line.startswith("[Gloo]")]
