"""Watches the other processes of a run: when one dies or hangs, this one says which and ends.

Without it, a process waits in a collective for what never comes until the heartbeats of jax's own service fail, and jax
then aborts with a stack trace that names nothing. Here each process keeps the connection over which it reported to
process 0 (see `roll_call`). The system closes it the moment a process dies, however that happens; over it a process
also says at regular times that it lives, and at its end that it ends. Process 0 tells the others what it sees.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping

from jaxcl.sharding.clusters import ProcessId

EXIT_LOST = 75
"""Exit code of a process that ends because another one is gone: the same command goes on from the last checkpoint."""

# Signs of life within the time after which a process counts as hanging, and seconds between them at most.
_SIGNS, _LONGEST_PAUSE = 12, 1.0
# Seconds that a process has to end by itself after another one has: mostly both fail for the same reason.
_OWN_REASON_SECONDS = 5.0
# Process 0 ends last, see `processes`.
_LAST_SECONDS = 2.0
# Longest line in bytes. A peer that sends a longer one does not run this version.
_LONGEST = 4096
_BYE, _LEFT, _GONE = b"bye", b"left ", b"gone "


@dataclasses.dataclass
class _Peer:
    """Another process, as it is seen here.

    Attributes:
      index: which one.
      link: the connection with it.
      silent: seconds since something was heard of it.
      said: the beginning of a line.
      left: what it said of its end, and when this process ends because of it.
    """

    index: int
    link: socket.socket
    silent: float = 0.0
    said: bytes = b""
    left: tuple[str, float] | None = None


class Watch:
    """Watches from a thread of its own until all others have said that they end.

    Args:
      process: this process.
      links: connections with other processes, by their index: process 0's with all, or one with process 0.
      timeout: seconds without a sign of life after which a process counts as hanging.
      end: ends this process with a line; for tests.
    """

    def __init__(
        self,
        process: ProcessId,
        links: Mapping[int, socket.socket],
        *,
        timeout: float,
        end: Callable[[str], object] | None = None,
    ) -> None:
        self._process, self._timeout = process, timeout
        self._interval = min(timeout / _SIGNS, _LONGEST_PAUSE)
        self._end = end or self._end_process
        self._selector = selectors.DefaultSelector()
        self._links = list(links.values())
        self._peers = [_Peer(index, link) for index, link in links.items()]
        self._sending = threading.RLock()
        for peer in self._peers:
            peer.link.setblocking(False)
            self._selector.register(peer.link, selectors.EVENT_READ, peer)

    def start(self) -> None:
        """Begins to watch, and says goodbye when the program ends as programs do."""
        atexit.register(self.part)
        _delay_aborts()
        threading.Thread(target=self._work, name="peers", daemon=True).start()

    def part(self) -> None:
        """Tells the others that this process ends as intended."""
        self._tell(_BYE)

    def leave(self, code: int) -> None:
        """Tells the others that this process is about to end alone, with an exit code."""
        self._tell(_LEFT + str(code).encode())

    def _tell(self, line: bytes) -> None:
        with self._sending:
            for link in self._links:
                with contextlib.suppress(OSError):  # it is gone, or hangs and has its buffer full
                    link.send(line + b"\n")

    def _work(self) -> None:
        last = told = time.monotonic()
        while self._peers:
            for key, _ in self._selector.select(self._interval):
                self._hear(key.data)
            now = time.monotonic()
            # While this process itself is stopped, it hears nothing of anybody.
            passed, last = min(now - last, 2 * self._interval), now
            if now - told >= self._interval:
                told = now
                self._tell(b"")
            for peer in list(self._peers):
                peer.silent += passed
                if peer.left is not None and now >= peer.left[1]:
                    self._lose(peer, f"has ended {peer.left[0]}")
                elif peer.silent > self._timeout:
                    self._lose(peer, f"hangs: no sign of life for {self._timeout:g} s")

    def _hear(self, peer: _Peer) -> None:
        try:
            part = peer.link.recv(_LONGEST)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        peer.silent = 0.0
        *lines, peer.said = (peer.said + part).split(b"\n")
        for line in lines:
            if line == _BYE:
                self._forget(peer)
                return
            if line.startswith(_GONE):
                self._end(line.removeprefix(_GONE).decode(errors="replace"))
            elif line.startswith(_LEFT):
                code = line.removeprefix(_LEFT).decode(errors="replace")
                peer.left = f"with exit code {code}, see its own output", time.monotonic() + _OWN_REASON_SECONDS
        if part and len(peer.said) <= _LONGEST:
            return
        if peer.left is None:
            self._lose(peer, "has died")
        else:
            self._selector.unregister(peer.link)

    def _forget(self, peer: _Peer) -> None:
        with contextlib.suppress(KeyError):  # it has left before
            self._selector.unregister(peer.link)
        self._peers.remove(peer)

    def _lose(self, peer: _Peer, what: str) -> None:
        self._forget(peer)
        words = f"process {peer.index} of {self._process.count} {what}"
        if self._process.index == 0:
            self._tell(_GONE + words.encode())
        self._end(words)

    def _end_process(self, words: str) -> None:
        # Not print: the main thread may be in the middle of one.
        os.write(2, f"jaxcl: {words}; run the same command again to resume\n".encode())
        if self._process.index == 0:
            time.sleep(_LAST_SECONDS)
        os._exit(EXIT_LOST)


def _delay_aborts() -> None:
    """Lets an abort of this process wait for 6 seconds, in the thread that aborts.

    When process 0 dies, jax's runtime sees it in the same moment as the watch and aborts. The watch shall have the last
    word. Nothing but a function of C may be called there, and a signal's handler gets its number: `sleep(SIGABRT)`.
    """
    with contextlib.suppress(AttributeError, OSError):  # another kind of system
        c = ctypes.CDLL(None)
        c.signal(int(signal.SIGABRT), ctypes.cast(c.sleep, ctypes.c_void_p))
