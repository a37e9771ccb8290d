"""Who writes at a URL: one run at a time, as far as that can be told.

Object stores have no locks. A run leaves a claim, and renews it while it lives. Who finds the claim of another one
waits long enough for it to be renewed: if it was, the other lives; if not, the claim is taken over. A run that was
paused or cut off for longer than that finds out before it writes its next state, and ends. What no claim can exclude:
it is overtaken between that look and the write. Then the later of two states of one number replaces the other.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from jaxcl.errors import UserError
from jaxcl.run.remote.objects import Objects

NAME = "claim.json"
BEAT = 10.0
"""Seconds between two renewals."""
BEATS = 3
"""After this many, a claim that was not renewed is that of a run that has ended."""


class Overtaken(UserError):
    """Another run has taken over a URL."""


class Claim:
    """The claim of this process to write at a URL."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._identity = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Claims the URL, and renews the claim in the background.

        Raises:
          UserError: another run writes there, or the claim cannot be read or written.
        """
        found = self._read()
        if found is not None and not self._ended(found):
            raise self._refusal(found)
        self._write(0)
        self._thread = threading.Thread(target=self._renew, name="claim", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Looks whether the claim is still this process's.

        Raises:
          Overtaken: another run has taken it over.
          UserError: it cannot be read.
        """
        found = self._read()
        # Half a claim is one that is being renewed, where storage does not write in one piece.
        if found is not None and _fields(found).get("identity", self._identity) != self._identity:
            raise self._refusal(found)

    def release(self) -> None:
        """Gives the claim back, if it is still this process's."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        try:
            self.check()
            self._objects.remove([NAME])
        except UserError:  # it is not ours any more, or cannot be read: it is not renewed any more, either
            pass

    def _ended(self, found: bytes) -> bool:
        """Whether the run that left a claim has ended."""
        fields = _fields(found)
        if fields.get("machine") == _machine():
            return not _lives(fields.get("process"))
        print(
            f"{self._objects.url} was in use by {_owner(found)}; looking for {BEAT * BEATS:g} s whether it still is",
            file=sys.stderr,
        )
        until = time.monotonic() + BEAT * BEATS
        while time.monotonic() < until:
            time.sleep(min(1.0, BEAT / 4))
            if (now := self._read()) != found:
                return now is None
        return True

    def _renew(self) -> None:
        count = 0
        while not self._stop.wait(BEAT):
            count += 1
            try:
                self.check()
                self._write(count)
            except UserError:  # told before the next state is written, if it lasts
                continue

    def _read(self) -> bytes | None:
        try:
            return self._objects.read(NAME)
        except FileNotFoundError:
            return None

    def _write(self, count: int) -> None:
        content = {"identity": self._identity, "host": socket.gethostname(), "machine": _machine()}
        self._objects.write(NAME, json.dumps({**content, "process": _process(os.getpid()), "count": count}).encode())

    def _refusal(self, found: bytes) -> Overtaken:
        return Overtaken(f"output {self._objects.url}: {_owner(found)} is running here; name another output")


def _fields(content: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _owner(content: bytes) -> str:
    fields = _fields(content)
    process = fields.get("process")
    return f"process {process[0]} on {fields.get('host')}" if isinstance(process, list) and process else "another run"


def _machine() -> str:
    """What processes that can see each other share; empty if the system does not say."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {uuid.uuid4().hex}"


def _process(number: int) -> list[int] | None:
    """A process's number and when it started; `None` if there is none of this number."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] == "Z" else [number, int(fields[19])]


def _lives(process: object) -> bool:
    return isinstance(process, list) and bool(process) and type(process[0]) is int and _process(process[0]) == process
