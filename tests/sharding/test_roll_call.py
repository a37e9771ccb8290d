"""Real sockets on 127.0.0.1; a thread a process."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
import time
from collections.abc import Sequence
from typing import Any

import pytest

from jaxcl.errors import UserError
from jaxcl.sharding.clusters import ProcessId
from jaxcl.sharding.roll_call import _STRANGERS, _proof, roll_call

VERSIONS = {"jax": "1", "jaxcl": "2"}


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def call(
    places: Sequence[tuple[ProcessId, dict[str, str]]], timeout: float, tokens: Sequence[str] = ()
) -> list[str | None]:
    """What each process is told: nothing, or an error."""

    def one(place: ProcessId, versions: dict[str, str], token: str) -> str | None:
        try:
            for link in roll_call(place, versions, timeout=timeout, token=token).values():
                link.close()
        except UserError as error:
            return str(error)
        return None

    with concurrent.futures.ThreadPoolExecutor() as threads:
        tokens = tokens or [""] * len(places)
        return list(threads.map(lambda given, token: one(*given, token), places, tokens))


def places(port: int, count: int, indices: Sequence[int]) -> list[tuple[ProcessId, dict[str, str]]]:
    return [(ProcessId("127.0.0.1", port, count, index), VERSIONS) for index in indices]


def test_all_there(port: int) -> None:
    assert call(places(port, 4, [3, 1, 0, 2]), 20) == [None] * 4
    # The port is free again for jax's own service.
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_peer_that_never_comes_is_named_to_all(port: int) -> None:
    started = time.monotonic()
    told = call(places(port, 4, [0, 2]), 0.5)
    assert time.monotonic() - started < 5
    expected = f"process 1, 3 of 4 did not report to 127.0.0.1:{port} within 0.5 s; see its own output"
    assert told == [expected] * 2


def test_a_coordinator_that_never_comes(port: int) -> None:
    (told,) = call(places(port, 2, [1]), 0.3)
    assert told == f"process 0 could not be reached at 127.0.0.1:{port} within 0.3 s: connection refused"


def test_a_port_in_use(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        (told,) = call(places(port, 2, [0]), 5)
    assert told == f"port {port} of process 0 is in use: stop what uses it, or choose another coordinator port"


def test_something_else_at_the_port(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as other:
        other.settimeout(0.1)
        with concurrent.futures.ThreadPoolExecutor() as threads:
            told = threads.submit(call, places(port, 2, [1]), 5)
            other.settimeout(5)
            peer, _ = other.accept()
            peer.sendall(b"HTTP/1.1 400 Bad Request\n")
            peer.close()
            assert told.result() == [
                f"process 0 at 127.0.0.1:{port} ended, gave no answer within 5 s or has another JAXCL_TOKEN; see its "
                "own output"
            ]


def test_strangers_are_not_counted(port: int) -> None:
    with concurrent.futures.ThreadPoolExecutor() as threads:
        told = threads.submit(call, places(port, 2, [0]), 20)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"", b'{"index": "one"}\n', b"[]\n"):
            for _ in range(200):
                try:
                    with socket.create_connection(("127.0.0.1", port)) as stranger:
                        stranger.sendall(words)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
        assert call(places(port, 2, [1]), 20) == [None]
        assert told.result() == [None]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((2, 0, VERSIONS), None),
        ((3, 1, VERSIONS), "process 1 expects 3 processes, process 0 expects 2"),
        ((2, 1, VERSIONS | {"jax": "0"}), "process 1 runs jax 0, process 0 jax 1"),
    ],
)
def test_contradictions_are_told_to_both(port: int, other: tuple, message: str | None) -> None:
    count, index, versions = other
    if message is None:
        message = f"port {port} of process 0 is in use: stop what uses it, or choose another coordinator port"
        told = call([*places(port, 2, [0]), (ProcessId("127.0.0.1", port, 2, 0), versions)], 0.5)
        assert message in told
        return
    told = call([*places(port, 2, [0]), (ProcessId("127.0.0.1", port, count, index), versions)], 10)
    assert told == [message] * 2


def test_one_place_taken_twice(port: int) -> None:
    told = call(places(port, 3, [0, 1, 1]), 10)
    assert told == ["two processes have the index 1 of 3"] * 3


def wait_for(port: int) -> socket.socket:
    """A connection to process 0, once it listens."""
    for _ in range(2000):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.01)
    raise AssertionError("nobody listens")


def report(**changes: Any) -> bytes:
    known = {"index": 1, "count": 2, "versions": VERSIONS, "proof": _proof("", 1, 2)}
    return json.dumps(known | changes).encode() + b"\n"


@pytest.mark.parametrize(
    "words",
    [
        b"[" * 60_000 + b"\n",
        b"1" * 5000 + b"\n",
        report(index=True, proof=_proof("", True, 2)),
        report(index=7, proof=_proof("", 7, 2)),
        report(index=-1, proof=_proof("", -1, 2)),
        report(index=[], proof=""),
        report(versions=[]),
        report(proof=None),
        report(proof="\u00e9"),
        report(proof=_proof("guess", 1, 2)),
    ],
    ids=range(10),
)
def test_a_forged_report_is_not_counted(words: bytes, port: int) -> None:
    with concurrent.futures.ThreadPoolExecutor() as threads:
        told = threads.submit(call, places(port, 2, [0]), 60)
        with wait_for(port) as stranger:
            stranger.sendall(words)
            stranger.settimeout(60)
            assert stranger.recv(100) == b"", "it gets no answer"
        assert call(places(port, 2, [1]), 60) == [None]
        assert told.result() == [None]


def test_only_who_shares_the_token_takes_part(port: int) -> None:
    assert call(places(port, 2, [0, 1]), 60, ["secret", "secret"]) == [None] * 2
    told = call(places(port, 2, [0, 1]), 1, ["secret", "guess"])
    assert told[0] is not None
    assert told[0].endswith("within 1 s; see its own output (1 with another JAXCL_TOKEN did)")
    assert told[1] is not None
    assert "or has another JAXCL_TOKEN" in told[1]


def test_silent_strangers_hold_nobody_up(port: int) -> None:
    with concurrent.futures.ThreadPoolExecutor() as threads, contextlib.ExitStack() as strangers:
        told = threads.submit(call, places(port, 2, [0]), 60)
        for _ in range(_STRANGERS + 10):
            strangers.enter_context(wait_for(port))
        assert call(places(port, 2, [1]), 60) == [None]
        assert told.result() == [None]


def test_too_many_bytes_end_the_talk(port: int) -> None:
    with concurrent.futures.ThreadPoolExecutor() as threads:
        told = threads.submit(call, places(port, 2, [0]), 60)
        with wait_for(port) as stranger, contextlib.suppress(ConnectionError):
            stranger.settimeout(60)
            for _ in range(200):
                stranger.sendall(b"x" * 2**16)
            raise AssertionError("it was listened to for ever")
        assert call(places(port, 2, [1]), 60) == [None]
        assert told.result() == [None]
