"""Where metrics go: a JSON line each, TensorBoard, experiment trackers, a progress bar."""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import jax

from jaxcl.data.files import open_end, replacing
from jaxcl.errors import UserError
from jaxcl.training.trackers import TRACKERS, Tracked, check_tracker

Row = Mapping[str, Any]

METRICS = "metrics.jsonl"
"""The file of rows in a run folder that is always written."""


class Sink(Protocol):
    """Receives the rows of metrics."""

    def write(self, row: Row) -> None:
        """Writes one row: `step`, `task`, `kind` and numbers by name."""
        ...

    def close(self, *, finished: bool = True) -> None:
        """Nothing follows; `finished` is whether the run reached its end."""
        ...


class JsonLines:
    """One JSON object per line.

    Attributes:
      steps: number of steps that its rows say something about.
    """

    def __init__(self, path: str | os.PathLike[str], *, after: int | None = None) -> None:
        """Opens the file for appending.

        Args:
          path: the file.
          after: the step from which a run is resumed: rows of later steps, from before the interruption, are removed.
            `None` keeps everything.

        Raises:
          UserError: the file cannot be written, or is a link.
        """
        self.path = Path(path)
        self.steps = 0
        try:
            if after is not None and self.path.exists():
                self._truncate(after)
            # A row is in the file when `write` returns, and `close` has nothing left to write.
            self._file = open_end(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error

    def write(self, row: Row) -> None:
        """Appends a row.

        Raises:
          UserError: the disk is full, or the file cannot be written for another reason.
        """
        try:
            self._file.write((json.dumps(dict(row), allow_nan=False) + "\n").encode())
            self.steps += _steps(row)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error

    def close(self, *, finished: bool = True) -> None:
        """Closes the file."""
        self._file.close()

    def _truncate(self, after: int) -> None:
        kept = []
        for line, row in _rows(self.path):
            if row.get("step", 0) <= after:
                kept.append(line + b"\n")
                self.steps += _steps(row)
        with replacing(self.path) as temporary:
            temporary.write_bytes(b"".join(kept))


def seconds_after(path: str | os.PathLike[str], step: int) -> float:
    """Seconds of the steps after one, by the rows that a run logged; 0 without a file.

    Args:
      path: what `JsonLines` wrote.
      step: the step.
    """
    if not Path(path).exists():
        return 0.0
    # Rows of several kinds that end with the same step share its seconds.
    seconds = {row["step"]: row["seconds"] for _, row in _rows(Path(path)) if row.get("step", 0) > step}
    return float(sum(seconds.values()))


def _steps(row: Row) -> int:
    steps = row.get("steps", 0)
    return steps if isinstance(steps, int) else 0


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a file, and what they hold."""
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the last line, if the run was killed while writing it
            continue
        if isinstance(row, dict) and isinstance(row.get("step", 0), int | float):
            yield line, row


class TensorBoard:
    """TensorBoard events, one curve `kind/name` per metric. If they cannot be written, a line says so once.

    They are written here and not by tensorboardX's `SummaryWriter`: the thread of that one dies when the disk is full,
    and whoever hands it events then waits for ever.
    """

    def __init__(self, folder: str | os.PathLike[str], *, after: int | None = None) -> None:
        """Opens the folder.

        Args:
          folder: where the event files go.
          after: the step a run goes on from; events of later steps are hidden (see `JsonLines`).
        """
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import masked_crc32c
        from tensorboardX.summary import scalar

        self._event, self._scalar, self._checksum = Event, scalar, masked_crc32c
        self._folder, now = Path(folder), time.time()
        self._file: IO[bytes] | None = None
        events = [Event(wall_time=now, file_version="brain.Event:2")]
        if after is not None:
            events.append(Event(wall_time=now, step=after + 1, session_log=SessionLog(status=SessionLog.START)))
        # Files are named by the second; one that was written in the same second must not be written over.
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{uuid.uuid4().hex[:8]}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: nothing is left to write when it is closed.
            self._file = open(self._folder / name, "xb", buffering=0)  # noqa: SIM115
        except OSError as error:
            self._fail(error)
        self._add(events)

    def write(self, row: Row) -> None:
        """Adds every number of a row."""
        now, step, kind = time.time(), row["step"], row.get("kind", "task")
        self._add(
            [
                self._event(wall_time=now, step=step, summary=self._scalar(f"{kind}/{name}", value))
                for name, value in row.items()
                if name not in ("step", "task") and isinstance(value, int | float)
            ]
        )

    def close(self, *, finished: bool = True) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _add(self, events: Sequence[Any]) -> None:
        """Appends events: records of length, its checksum, message, its checksum."""
        content = b""
        for message in (event.SerializeToString() for event in events):
            length = struct.pack("<Q", len(message))
            content += length + struct.pack("<I", self._checksum(length))
            content += message + struct.pack("<I", self._checksum(message))
        try:
            while self._file is not None and content:
                content = content[self._file.write(content) :]
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.close()
        print(
            f"tensorboard: {self._folder}: cannot be written: {error.strerror or error}; the run goes on without it",
            file=sys.stderr,
            flush=True,
        )


def check_sinks(names: Sequence[str]) -> None:
    """Whether what the named sinks need is installed.

    Raises:
      UserError: a package is missing; names the command that installs it.
    """
    for name in names:
        if name in TRACKERS:
            check_tracker(name)


def open_sinks(
    folder: str | os.PathLike[str],
    names: Sequence[str] = ("jsonl", "tensorboard"),
    *,
    config: Mapping[str, Any] | None = None,
    after: int | None = None,
) -> list[Sink]:
    """The sinks of a run folder on process 0, none on the others.

    Args:
      folder: the run folder; gets `metrics.jsonl` and, if named, `tensorboard/`.
      names: `training.sinks`. `jsonl` is always among the sinks, as the first one.
      config: the configuration as plain values, for the trackers.
      after: the step from which a run is resumed; `None` for a new run.

    Raises:
      UserError: the folder cannot be written.
    """
    if jax.process_index() != 0:
        return []
    root = Path(folder)
    sinks: list[Sink] = [JsonLines(root / METRICS, after=after)]
    if "tensorboard" in names:
        sinks.append(TensorBoard(root / "tensorboard", after=after))
    return [*sinks, *(Tracked(name, root, config or {}) for name in TRACKERS if name in names)]


class Progress:
    """Steps, loss, tokens per second and remaining time of one task, on process 0.

    A bar on a terminal; otherwise a line every half minute, so that log files stay short.
    """

    interval = 30.0

    def __init__(self, name: str, *, done: int, total: int, enabled: bool = True) -> None:
        self.enabled = enabled and jax.process_index() == 0
        self._name, self._done, self._first, self._total = name, done, done, total
        self._shown = time.monotonic()
        self._tokens = 0.0
        self._rate_start: float | None = None
        self._bar: Any = None
        if self.enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=name, unit="step", dynamic_ncols=True, leave=True)

    def advance(self, loss: float, tokens: float) -> None:
        """Counts one finished step.

        Args:
          loss: its loss.
          tokens: its number of tokens.
        """
        now = time.monotonic()
        self._done += 1
        if self._rate_start is None:  # the first step includes compilation and does not count
            self._rate_start = now
        else:
            self._tokens += tokens
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {self.rate(now):,.0f} tokens/s", refresh=False)
            self._bar.update()
        elif now - self._shown >= self.interval or self._done == self._total:
            self._shown = now
            remaining = (now - self._rate_start) / max(self._done - self._first - 1, 1) * (self._total - self._done)
            print(
                f"{self._name}: step {self._done}/{self._total}, loss {loss:.3f}, {self.rate(now):,.0f} tokens/s, "
                f"{remaining:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def rate(self, now: float | None = None) -> float:
        """Tokens per second since the first step was finished; 0 before."""
        if self._rate_start is None:
            return 0.0
        seconds = (time.monotonic() if now is None else now) - self._rate_start
        return self._tokens / seconds if seconds > 0 else 0.0

    def close(self) -> None:
        """Closes the bar and leaves it on the screen."""
        if self._bar is not None:
            self._bar.close()
