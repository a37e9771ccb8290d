"""Whether all processes of a run are there, found out before jax's runtime starts.

The runtime aborts with a stack trace where a peer does not come, and crashes where its port is taken. So process 0
listens on that port first, the others report, and all learn the same verdict: go, or one line that says what is wrong.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import time
from collections.abc import Mapping, Set

from jaxcl.errors import UserError
from jaxcl.sharding.clusters import Place

# What the others may wait longer than process 0, whose verdict names who is missing.
_GRACE = 5.0
_LONGEST = 65536


def roll_call(place: Place, versions: Mapping[str, str], *, timeout: float) -> None:
    """Waits until every process has reported to process 0.

    Args:
      place: this process and where process 0 listens.
      versions: must be equal in all processes, by name.
      timeout: seconds.

    Raises:
      UserError: a process did not come in time, the port is in use, or the processes contradict each other. Every
        process that reached process 0 raises the same.
    """
    deadline = time.monotonic() + timeout
    if place.index == 0:
        _hold(place, versions, deadline, timeout)
    else:
        _report(place, versions, deadline, timeout)


def _hold(place: Place, versions: Mapping[str, str], deadline: float, timeout: float) -> None:
    """Process 0: takes the reports, tells the verdict."""
    came: set[int] = set()
    peers: list[socket.socket] = []
    with contextlib.ExitStack() as open_sockets:
        server = open_sockets.enter_context(_listen(place))
        problem = None
        while problem is None and len(came) < place.count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                peer = open_sockets.enter_context(server.accept()[0])
            except TimeoutError:
                missing = [str(index) for index in range(1, place.count) if index not in came]
                problem = (
                    f"process {', '.join(missing)} of {place.count} did not come to {place.coordinator} "
                    f"within {timeout:g} s; see its own output"
                )
                break
            report = _receive(peer, min(deadline, time.monotonic() + _GRACE))
            if report is None or not isinstance(report.get("index"), int):  # not one of ours
                continue
            problem = _contradiction(place, versions, report, came)
            came.add(int(str(report["index"])))
            peers.append(peer)
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.sendall(json.dumps({"problem": problem}).encode() + b"\n")
    if problem is not None:
        raise UserError(problem)


def _report(place: Place, versions: Mapping[str, str], deadline: float, timeout: float) -> None:
    """The other processes: report, wait for the verdict."""
    with _connect(place, deadline, timeout) as peer:
        report = {"index": place.index, "count": place.count, "versions": dict(versions)}
        with contextlib.suppress(OSError):
            peer.sendall(json.dumps(report).encode() + b"\n")
        verdict = _receive(peer, deadline + _GRACE)
    if verdict is None or "problem" not in verdict:
        raise UserError(
            f"process 0 at {place.coordinator} ended or gave no answer within {timeout:g} s; see its own output"
        )
    if verdict["problem"] is not None:
        raise UserError(str(verdict["problem"]))


def _listen(place: Place) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", place.port), family=family, backlog=place.count, dualstack_ipv6=dual)
    except OSError as error:
        reason = "in use" if error.errno == errno.EADDRINUSE else f"not to be had ({error.strerror})"
        raise UserError(
            f"port {place.port} of process 0 is {reason}: end what uses it, or choose another coordinator port"
        ) from error


def _connect(place: Place, deadline: float, timeout: float) -> socket.socket:
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            return socket.create_connection((place.host, place.port), timeout=left)
        except OSError as error:  # not there yet, or its name not known yet
            reason = (error.strerror or str(error)).lower()
            time.sleep(min(0.1 if timeout < 30 else 1.0, max(left, 0)))
    raise UserError(f"process 0 was not to be reached at {place.coordinator} within {timeout:g} s: {reason}")


def _receive(peer: socket.socket, deadline: float) -> dict[str, object] | None:
    """One line of JSON, `None` if none comes."""
    content = b""
    try:
        while not content.endswith(b"\n") and len(content) < _LONGEST:
            peer.settimeout(max(deadline - time.monotonic(), 0.001))
            part = peer.recv(4096)
            if not part:
                return None
            content += part
        message = json.loads(content)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


def _contradiction(
    place: Place, versions: Mapping[str, str], report: Mapping[str, object], came: Set[int]
) -> str | None:
    index = report["index"]
    if report.get("count") != place.count:
        return f"process {index} was told of {report.get('count')} processes, process 0 of {place.count}"
    if index in came or index == 0:
        return f"two processes say that they are process {index} of {place.count}"
    theirs = report.get("versions")
    if theirs != dict(versions) and isinstance(theirs, Mapping):
        name = next(name for name in sorted({*theirs, *versions}) if theirs.get(name) != versions.get(name))
        return f"process {index} runs {name} {theirs.get(name)}, process 0 {name} {versions.get(name)}"
    return None
