"""Calls readers with bytes: a crash is an error of a kind that the reader does not document, and what takes much.

An input may take `SECONDS` of processor time, wait as long for others, and take `MEMORY` bytes.
"""

from __future__ import annotations

import os
import resource
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from jaxcl.errors import UserError

#: Seconds that an input may take: of the process's own time, and of time in which this process would not have run. What
#: else the machine does changes neither.
SECONDS = 2.0
#: Bytes that an input may take beyond what the process has.
MEMORY = 2**30
# Address space beyond the present one: libraries reserve more than they use. It ends what would take all there is.
_SPACE = 4 * MEMORY
# The first input of a reader imports what the reader needs.
_FIRST = 10
# On a disk, removing the folder of an input can take longer than reading it.
_PLACE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
_WAKE = signal.SIGURG  # libFuzzer uses SIGALRM and SIGUSR1; by default this one does nothing


@dataclass(frozen=True)
class Target:
    """A reader of bytes from elsewhere.

    Attributes:
      read: reads the bytes; gets them and an empty folder.
      seeds: bytes that it can read, from which inputs are made.
      errors: what it raises for bytes that it cannot read.
      weight: how dear an input is: a short round tries fewer.
      waits: seconds that an input may wait for other processes.
    """

    read: Callable[[bytes, Path], object]
    seeds: Callable[[], list[bytes]]
    errors: tuple[type[Exception], ...] = (UserError,)
    weight: int = 1
    waits: float = SECONDS


class Hang(BaseException):
    """An input took more than `SECONDS`."""


class TooLarge(BaseException):
    """An input took more than `MEMORY`."""


@dataclass
class Counts:
    """What came of the inputs of one reader.

    Attributes:
      seeds: inputs that are known to be readable.
      inputs: how many there were.
      read: how many of them could be read.
      changed: how many of those were none of the seeds. Without any, only the first lines of the reader were tried.
      crashes: an input for each place that something else than a documented error came from, with its last lines.
    """

    seeds: Collection[bytes] = ()
    inputs: int = 0
    read: int = 0
    changed: int = 0
    crashes: dict[str, tuple[bytes, str]] = field(default_factory=dict)

    def line(self, name: str) -> str:
        """A row of the table that is printed."""
        return f"{name:<20} {self.inputs:>10,} inputs {self.read:>10,} read {len(self.crashes):>4} crashes"


def feed(target: Target, content: bytes, counts: Counts) -> None:
    """Reads one input and counts what came of it."""
    times = 1 if counts.inputs else _FIRST
    counts.inputs += 1
    try:
        with (
            tempfile.TemporaryDirectory(prefix="fuzz", dir=_PLACE) as folder,
            warnings.catch_warnings(),
            _little_memory(),
            _processor_time(times * SECONDS),
            _waiting(times * target.waits),
        ):
            warnings.simplefilter("ignore")
            target.read(content, Path(folder))
            counts.read += 1
            counts.changed += content not in counts.seeds
    except target.errors:
        pass
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust is no `Exception`
        counts.crashes.setdefault(_place(error), (content, "".join(traceback.format_exception(error)[-4:])))


@contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    """Raises `Hang` in the block after these seconds of the process's own time."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} s of processor time")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


@contextmanager
def _waiting(seconds: float) -> Iterator[None]:
    """Raises `Hang` in the block once it has taken these seconds without the time in which no core was free for it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} s of waiting")

    thread = threading.get_native_id()
    previous = signal.signal(_WAKE, stop)
    _WATCHER.watch(_Watched(thread, seconds, time.monotonic(), _queued(thread)))
    try:
        yield
    finally:
        try:
            _WATCHER.watch(None)
        finally:
            signal.signal(_WAKE, previous)


class _Watched(NamedTuple):
    """What a block of `_waiting` began with."""

    thread: int
    seconds: float
    began: float
    queued: float

    def is_late(self) -> bool:
        return time.monotonic() - self.began - (_queued(self.thread) - self.queued) >= self.seconds


class _Watcher:
    """One thread for all blocks of the main thread: starting one for each takes longer than most inputs."""

    _EVERY = 0.05

    def __init__(self) -> None:
        self._watched: _Watched | None = None
        self._lock = threading.Lock()
        self._never = threading.Event()  # waits also where a test has replaced `time.sleep`
        self._thread: threading.Thread | None = None

    def watch(self, block: _Watched | None) -> None:
        """Watches a block, in place of the one before; `None`: it has ended, and gets no signal any more."""
        with self._lock:
            self._watched = block
        if block is not None and self._thread is None:
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()

    def _look(self) -> None:
        while True:
            self._never.wait(self._EVERY)
            block = self._watched
            if block is not None and block.is_late():
                with self._lock:  # it may have ended meanwhile
                    if self._watched is block:
                        self._watched = None
                        signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)


_WATCHER = _Watcher()


def _queued(thread: int) -> float:
    """Seconds that a thread was ready to run and did not."""
    try:
        return int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[1]) / 1e9
    except OSError:  # another system than Linux: a busy machine counts
        return 0.0


@contextmanager
def _little_memory() -> Iterator[None]:
    """Raises `TooLarge` behind a block that took more than `MEMORY`, or `MemoryError` in it if it wants far more."""
    before = _memory()
    if before is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + _SPACE
    resource.setrlimit(resource.RLIMIT_AS, (space if hard == resource.RLIM_INFINITY else min(space, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        taken = (_memory(peak=True) or 0) - before
        if taken > MEMORY:
            raise TooLarge(f"{taken / 2**20:,.0f} MiB")


def _memory(*, peak: bool = False) -> int | None:
    """Bytes in memory: the present ones, from which the peak is counted anew; or that peak. `None`: not Linux."""
    try:
        if not peak:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    name = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _place(error: BaseException) -> str:
    """The kind of an error and the last line of jaxcl that it came through: one crash each."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/jaxcl/" in frame.filename]
    last = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"
    return f"{type(error).__name__} at {last}"
