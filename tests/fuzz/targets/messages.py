"""What comes over a network: from other processes, from clients, from storage."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from jaxcl.errors import UserError
from jaxcl.run.grid import why_unusable
from jaxcl.run.remote import claim
from jaxcl.run.remote.objects import Objects
from jaxcl.run.remote.reading import read_record
from jaxcl.run.remote.state import File, State
from jaxcl.run.wire import pack, tree_like, unpack
from jaxcl.sharding import roll_call
from jaxcl.sharding.clusters import ProcessId
from tests.fuzz.harness import Target
from tests.fuzz.targets.common import text_of, written

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


def read_message(content: bytes, folder: Path) -> None:
    arrays, words = unpack(content)
    for array in arrays.values():
        array.sum() if array.dtype.kind in "fiu" else array.tobytes()
    tree_like(arrays, {"params": {"bias": np.zeros(2, np.float32)}})
    [why_unusable(what, words) for what in ("begin", "describe", "save", "score")]


def messages() -> list[bytes]:
    tree = {"params": {"bias": np.ones(2, np.float32), "weight": np.zeros((2, 3), np.float32)}}
    return [pack(tree, {"weight": 3.0, "skipped": 1}), pack({}, {"what": "hello", "words": {}})]


def read_state(content: bytes, folder: Path) -> None:
    """What a state says, with the right checksum."""
    with suppress(UserError):
        State.decode(content, "state")
    state = State.decode(hashlib.sha256(content).hexdigest().encode() + b"\n" + content, "state")
    for name, file in state.files.items():
        path = written(folder / name, b"")
        os.truncate(path, file.size % 2**20)
        os.utime(path, (file.changed, file.changed))
        assert (folder / "files" / file.place(name)).resolve().is_relative_to(folder.resolve())


def states() -> list[bytes]:
    files = {"config.yaml": File(1, "0" * 64, 0.5), "a/b.json": File(20, "1" * 64, 1.7e9)}
    return [State(7, "id", files).encode().partition(b"\n")[2]]


def read_mirror(content: bytes, folder: Path) -> None:
    written(folder / ".mirror.json", content)
    read_record(folder)


def mirrors() -> list[bytes]:
    # Long texts and many spaces: a change within them leaves JSON.
    states = [f"{number:032x}" for number in range(8)]
    records = [{"url": f"gs://{'bucket' * 4}/run", "states": states[:count], "whole": count > 0} for count in (0, 1, 8)]
    return [*map(text_of, records), text_of(records[1]).replace(b" ", b" " * 20)]


def read_claim(content: bytes, folder: Path) -> None:
    """Another run's claim to a URL."""
    place = Objects(f"file://{folder}")
    written(folder / claim.NAME, content)
    mine = claim.Claim(place)
    with suppress(UserError):
        mine.check()
    fields = claim._fields(content)
    claim._owner(content).encode("utf-8", "replace")
    if fields.get("machine") == claim._machine():
        mine._ended(content)


def claims() -> list[bytes]:
    fields = {"identity": "0" * 32, "host": "h", "machine": claim._machine(), "process": [1, 2], "count": 3}
    return [text_of(fields), text_of({**fields, "machine": "x"})]


TARGETS: dict[str, Target] = {
    "roll_call": Target(read_report, reports),
    "message": Target(read_message, messages),
    "state": Target(read_state, states),
    "mirror": Target(read_mirror, mirrors),
    "claim": Target(read_claim, claims),
    "verdict": Target(read_verdict, lambda: [b'{"problem": null}\n', b'{"problem": "x"}\n']),
}
