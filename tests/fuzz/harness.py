"""Calls readers with bytes: anything but an error of a kind that the reader documents is a crash, and so is a hang."""

from __future__ import annotations

import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from jaxcl.errors import UserError

#: Seconds of this process's own time that an input may take: a busy machine changes nothing.
SECONDS = 2.0
# On a disk, removing the folder of an input can take longer than reading it.
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass(frozen=True)
class Target:
    """A reader of bytes from elsewhere.

    Attributes:
      read: reads the bytes; gets them and an empty folder.
      seeds: bytes that it can read, from which inputs are made.
      errors: what it raises for bytes that it cannot read.
      weight: how dear an input is: a short round tries fewer.
    """

    read: Callable[[bytes, Path], object]
    seeds: Callable[[], list[bytes]]
    errors: tuple[type[Exception], ...] = (UserError,)
    weight: int = 1


class Hang(BaseException):
    """An input took more than `SECONDS`."""


@dataclass
class Counts:
    """What came of the inputs of one reader.

    Attributes:
      inputs: how many there were.
      read: how many of them could be read.
      crashes: an input for each place that something else than a documented error came from, with its last lines.
    """

    inputs: int = 0
    read: int = 0
    crashes: dict[str, tuple[bytes, str]] = field(default_factory=dict)

    def line(self, name: str) -> str:
        """A row of the table that is printed."""
        return f"{name:<20} {self.inputs:>10,} inputs {self.read:>10,} read {len(self.crashes):>4} crashes"


@contextmanager
def limited() -> Iterator[None]:
    """Raises `Hang` in the block after `SECONDS` of the process's own time."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {SECONDS:g} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def feed(target: Target, content: bytes, counts: Counts) -> None:
    """Reads one input and counts what came of it."""
    counts.inputs += 1
    try:
        with tempfile.TemporaryDirectory(prefix="fuzz", dir=_MEMORY) as folder, warnings.catch_warnings(), limited():
            warnings.simplefilter("ignore")
            target.read(content, Path(folder))
            counts.read += 1
    except target.errors:
        pass
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust is no `Exception`
        counts.crashes.setdefault(_place(error), (content, "".join(traceback.format_exception(error)[-4:])))


def _place(error: BaseException) -> str:
    """The kind of an error and the last line of jaxcl that it came through: one crash each."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/jaxcl/" in frame.filename]
    last = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"
    return f"{type(error).__name__} at {last}"
