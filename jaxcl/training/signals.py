"""Signals to a command: the first one asks it to stop, as `cli.main` and `interrupt` do; a second one ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def second_ends(line: str, code: int) -> Iterator[None]:
    """While active, the second signal to stop ends the process at once; a checkpoint that is being written is lost.

    A handler is not enough: it runs between two steps of the main thread's Python code, which may be waiting for a
    checkpoint, an upload or another process. So a thread counts the signals, of which the system tells it by itself.

    Args:
      line: what is printed then.
      code: the exit code.
    """
    here, there = socket.socketpair()
    with here, there:
        there.setblocking(False)
        threading.Thread(target=_count, args=(here, line, code), name="signals", daemon=True).start()
        previous = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous)
            there.shutdown(socket.SHUT_RDWR)


def _count(link: socket.socket, line: str, code: int) -> None:
    """Ends the process at the second signal; returns when there are no more."""
    seen = 0
    with contextlib.suppress(OSError):
        while numbers := link.recv(16):
            seen += sum(number in STOPPING for number in numbers)
            if seen >= 2:
                _end(line, code)


def _end(line: str, code: int) -> None:
    processes = sys.modules.get("jaxcl.sharding.processes")
    if processes is not None:
        processes.announce(code)
    # Not print: the main thread may be in the middle of one.
    os.write(2, f"{line}\n".encode())
    os._exit(code)
