"""Checks that all processes of a run have started, before jax's runtime does.

The runtime aborts with a stack trace if a process is missing, and crashes if its port is in use. So process 0 first
listens on that port, the others report to it, and all receive the same verdict: go, or one line of what is wrong.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import selectors
import socket
import time
from collections.abc import Container, Iterator, Mapping

from jaxcl.errors import UserError
from jaxcl.sharding.clusters import ProcessId

# Seconds that the others wait longer than process 0, whose verdict names the missing processes.
_GRACE = 5.0
# Bytes that a report or verdict may have, and guests at process 0's door beside the processes of the run.
_LONGEST, _STRANGERS = 65536, 64
#: The environment variable of the token that all processes of a run share.
TOKEN_KEY = "JAXCL_TOKEN"


def roll_call(
    process: ProcessId, versions: Mapping[str, str], *, timeout: float, token: str = ""
) -> dict[int, socket.socket]:
    """Waits until every process has reported to process 0.

    Args:
      process: this process.
      versions: versions by name; must be equal in all processes.
      timeout: seconds.
      token: a secret that all processes share; reports that do not know it are ignored, as other strangers are.

    Returns:
      The connections over which they reported, by the index of the process at the other end: in process 0 those with
      all others, in the others the one with process 0.

    Raises:
      UserError: a process did not report in time, the port is in use, or the processes contradict each other. Every
        process that reached process 0 raises the same error.
    """
    deadline = time.monotonic() + timeout
    if process.index == 0:
        return _hold(process, versions, deadline, timeout, token)
    return {0: _report(process, versions, deadline, timeout, token)}


def _hold(
    process: ProcessId, versions: Mapping[str, str], deadline: float, timeout: float, token: str
) -> dict[int, socket.socket]:
    """Process 0: collects the reports and sends the verdict."""
    came: set[int] = set()
    problem = None
    with _Door(process, token) as door:
        while problem is None and len(came) < process.count - 1:
            if time.monotonic() >= deadline:
                missing = [str(index) for index in range(1, process.count) if index not in came]
                problem = (
                    f"process {', '.join(missing)} of {process.count} did not report to {process.coordinator} "
                    f"within {timeout:g} s; see its own output"
                )
                if door.refused:
                    problem += f" ({door.refused} with another {TOKEN_KEY} did)"
                break
            for report in door.reports(deadline):
                problem = problem or _contradiction(process, versions, report, came)
                came.add(int(str(report["index"])))
        door.answer({"problem": problem})
        if problem is None:
            return door.keep()
    raise UserError(problem)


class _Door:
    """Process 0's port: anybody may come, and is let go who says nothing, too much or what no process of the run says.

    Attributes:
      refused: number of reports with another token.
    """

    def __init__(self, process: ProcessId, token: str) -> None:
        self.refused = 0
        self._token, self._most = token, process.count + _STRANGERS
        self._open = contextlib.ExitStack()
        self._selector = self._open.enter_context(selectors.DefaultSelector())
        self._server = self._open.enter_context(_listen(process))
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)
        # What each guest has said, and until when it has to finish; the oldest first.
        self._guests: dict[socket.socket, tuple[bytes, float]] = {}
        self._reported: list[tuple[int, socket.socket]] = []

    def __enter__(self) -> _Door:
        return self

    def __exit__(self, *error: object) -> None:
        for guest in (*self._guests, *(peer for _, peer in self._reported)):
            guest.close()
        self._open.close()

    def reports(self, deadline: float) -> Iterator[dict[str, object]]:
        """Waits until something happens; then the reports that are complete."""
        now = time.monotonic()
        for guest in [guest for guest, (_, until) in self._guests.items() if until <= now]:
            self._leave(guest).close()
        wait = min([deadline, *(until for _, until in self._guests.values())]) - now
        for key, _ in self._selector.select(max(wait, 0)):
            if key.fileobj is self._server:
                self._let_in()
            elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._guests:
                content = self._listen_to(key.fileobj)
                if content is None:
                    continue
                guest, report = self._leave(key.fileobj), self._checked(_parse(content))
                if report is None:
                    guest.close()
                else:
                    self._reported.append((int(str(report["index"])), guest))
                    yield report

    def answer(self, verdict: Mapping[str, object]) -> None:
        """Tells all processes that reported."""
        for _, peer in self._reported:
            with contextlib.suppress(OSError):
                peer.settimeout(_GRACE)
                peer.sendall(json.dumps(verdict).encode() + b"\n")

    def keep(self) -> dict[int, socket.socket]:
        """The connections of those who reported, by index; they stay open when the door is closed."""
        kept, self._reported = dict(self._reported), []
        return kept

    def _let_in(self) -> None:
        try:
            guest, _ = self._server.accept()
        except OSError:  # gone already
            return
        guest.setblocking(False)
        if len(self._guests) >= self._most:
            self._leave(next(iter(self._guests))).close()
        self._guests[guest] = b"", time.monotonic() + _GRACE
        self._selector.register(guest, selectors.EVENT_READ)

    def _listen_to(self, guest: socket.socket) -> bytes | None:
        """What a guest said, once it is complete."""
        try:
            part = guest.recv(4096)
        except BlockingIOError:
            return None
        except OSError:
            part = b""
        said, until = self._guests[guest]
        self._guests[guest] = said + part, until
        if not part or len(said) > _LONGEST:
            self._leave(guest).close()
            return None
        return said + part if part.endswith(b"\n") else None

    def _leave(self, guest: socket.socket) -> socket.socket:
        self._selector.unregister(guest)
        del self._guests[guest]
        return guest

    def _checked(self, report: dict[str, object] | None) -> dict[str, object] | None:
        """A report, if a process of this run wrote it."""
        if report is None:
            return None
        index, count, versions, proof = (report.get(name) for name in ("index", "count", "versions", "proof"))
        if type(index) is not int or type(count) is not int or not isinstance(versions, dict):
            return None
        if not 0 <= index < count or not (isinstance(proof, str) and proof.isascii()):
            return None
        if not hmac.compare_digest(proof, _proof(self._token, index, count)):
            self.refused += 1
            return None
        return report


def _proof(token: str, index: int, count: int) -> str:
    """What shows that a process knows the token, without telling it."""
    return hmac.new(token.encode("utf-8", "surrogateescape"), f"{index} of {count}".encode(), "sha256").hexdigest()


def _report(
    process: ProcessId, versions: Mapping[str, str], deadline: float, timeout: float, token: str
) -> socket.socket:
    """The other processes: report and wait for the verdict."""
    with contextlib.ExitStack() as unless_agreed:
        peer = unless_agreed.enter_context(_connect(process, deadline, timeout))
        proof = _proof(token, process.index, process.count)
        report = {"index": process.index, "count": process.count, "versions": dict(versions), "proof": proof}
        with contextlib.suppress(OSError):
            peer.sendall(json.dumps(report).encode() + b"\n")
        verdict = _receive(peer, deadline + _GRACE)
        if verdict is None or "problem" not in verdict:
            raise UserError(
                f"process 0 at {process.coordinator} ended, gave no answer within {timeout:g} s or has another "
                f"{TOKEN_KEY}; see its own output"
            )
        if verdict["problem"] is not None:
            raise UserError(str(verdict["problem"]))
        unless_agreed.pop_all()
        return peer


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
    except OSError:
        return None
    return _parse(content)


def _parse(content: bytes) -> dict[str, object] | None:
    """The object in a line of JSON, if there is one."""
    try:
        message = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _contradiction(
    process: ProcessId, versions: Mapping[str, str], report: Mapping[str, object], came: Container[int]
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
