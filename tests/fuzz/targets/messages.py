"""What comes over a network: from other processes, from clients, from storage."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from jaxcl.sharding import roll_call
from jaxcl.sharding.clusters import ProcessId
from tests.fuzz.harness import Target
from tests.fuzz.targets.common import text_of

_PROCESS = ProcessId("127.0.0.1", 0, 3, 0)


def read_report(content: bytes, folder: Path) -> None:
    """What somebody sends to the port of process 0, who then leaves."""
    with roll_call._Door(_PROCESS, "token") as door:
        port = door._server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as guest:
            guest.sendall(content[:60000])
            guest.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + 5
            door._let_in()
            while door._guests and time.monotonic() < deadline:
                for report in door.reports(deadline):
                    roll_call._contradiction(_PROCESS, {"jax": "1"}, report, {2})
                    int(str(report["index"]))
            assert not door._guests, "a guest who left is still waited for"


def reports() -> list[bytes]:
    return [
        text_of({"index": index, "count": 3, "versions": versions, "proof": roll_call._proof("token", index, 3)})
        + b"\n"
        for index, versions in ((1, {"jax": "1"}), (2, {"jax": "2"}))
    ]


def read_verdict(content: bytes, folder: Path) -> None:
    here, there = socket.socketpair()
    with here, there:
        there.sendall(content[:60000])
        there.shutdown(socket.SHUT_WR)
        verdict = roll_call._receive(here, time.monotonic() + 5)
        str(verdict and verdict.get("problem"))


TARGETS: dict[str, Target] = {
    "roll_call": Target(read_report, reports),
    "verdict": Target(read_verdict, lambda: [b'{"problem": null}\n', b'{"problem": "x"}\n']),
}
