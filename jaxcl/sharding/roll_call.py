"""Checks that all processes of a run have started, before jax's runtime does.

The runtime aborts with a stack trace if a process is missing, and crashes if its port is in use. So process 0 first
listens on that port, the others report to it, and all receive the same verdict: go, or one line of what is wrong.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import time
from collections.abc import Mapping, Set

from jaxcl.errors import UserError
from jaxcl.sharding.clusters import ProcessId

# Seconds that the others wait longer than process 0, whose verdict names the missing processes.
_GRACE = 5.0
_LONGEST = 65536


def roll_call(process: ProcessId, versions: Mapping[str, str], *, timeout: float) -> None:
    """Waits until every process has reported to process 0.

    Args:
      process: this process.
      versions: versions by name; must be equal in all processes.
      timeout: seconds.

    Raises:
      UserError: a process did not report in time, the port is in use, or the processes contradict each other. Every
        process that reached process 0 raises the same error.
    """
    deadline = time.monotonic() + timeout
    if process.index == 0:
        _hold(process, versions, deadline, timeout)
    else:
        _report(process, versions, deadline, timeout)


def _hold(process: ProcessId, versions: Mapping[str, str], deadline: float, timeout: float) -> None:
    """Process 0: collects the reports and sends the verdict."""
    came: set[int] = set()
    peers: list[socket.socket] = []
    with contextlib.ExitStack() as open_sockets:
        server = open_sockets.enter_context(_listen(process))
        problem = None
        while problem is None and len(came) < process.count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                peer = open_sockets.enter_context(server.accept()[0])
            except TimeoutError:
                missing = [str(index) for index in range(1, process.count) if index not in came]
                problem = (
                    f"process {', '.join(missing)} of {process.count} did not report to {process.coordinator} "
                    f"within {timeout:g} s; see its own output"
                )
                break
            report = _receive(peer, min(deadline, time.monotonic() + _GRACE))
            if report is None or not isinstance(report.get("index"), int):  # not a process of a run
                continue
            problem = _contradiction(process, versions, report, came)
            came.add(int(str(report["index"])))
            peers.append(peer)
        for peer in peers:
            with contextlib.suppress(OSError):
                peer.sendall(json.dumps({"problem": problem}).encode() + b"\n")
    if problem is not None:
        raise UserError(problem)


def _report(process: ProcessId, versions: Mapping[str, str], deadline: float, timeout: float) -> None:
    """The other processes: report and wait for the verdict."""
    with _connect(process, deadline, timeout) as peer:
        report = {"index": process.index, "count": process.count, "versions": dict(versions)}
        with contextlib.suppress(OSError):
            peer.sendall(json.dumps(report).encode() + b"\n")
        verdict = _receive(peer, deadline + _GRACE)
    if verdict is None or "problem" not in verdict:
        raise UserError(
            f"process 0 at {process.coordinator} ended or gave no answer within {timeout:g} s; see its own output"
        )
    if verdict["problem"] is not None:
        raise UserError(str(verdict["problem"]))


def _listen(process: ProcessId) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", process.port), family=family, backlog=process.count, dualstack_ipv6=dual)
    except OSError as error:
        reason = "in use" if error.errno == errno.EADDRINUSE else f"not available ({error.strerror})"
        raise UserError(
            f"port {process.port} of process 0 is {reason}: stop what uses it, or choose another coordinator port"
        ) from error


def _connect(process: ProcessId, deadline: float, timeout: float) -> socket.socket:
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            return socket.create_connection((process.host, process.port), timeout=left)
        except OSError as error:  # not listening yet, or its name is not known yet
            reason = (error.strerror or str(error)).lower()
            time.sleep(min(0.1 if timeout < 30 else 1.0, max(left, 0)))
    raise UserError(f"process 0 could not be reached at {process.coordinator} within {timeout:g} s: {reason}")


def _receive(peer: socket.socket, deadline: float) -> dict[str, object] | None:
    """One line of JSON; `None` if none arrives in time."""
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
    process: ProcessId, versions: Mapping[str, str], report: Mapping[str, object], came: Set[int]
) -> str | None:
    index = report["index"]
    if report.get("count") != process.count:
        return f"process {index} expects {report.get('count')} processes, process 0 expects {process.count}"
    if index in came or index == 0:
        return f"two processes have the index {index} of {process.count}"
    theirs = report.get("versions")
    if theirs != dict(versions) and isinstance(theirs, Mapping):
        name = next(name for name in sorted({*theirs, *versions}) if theirs.get(name) != versions.get(name))
        return f"process {index} runs {name} {theirs.get(name)}, process 0 {name} {versions.get(name)}"
    return None
