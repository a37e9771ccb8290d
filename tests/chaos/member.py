"""One process of a run, which kills itself with SIGKILL at a given file operation or time."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxcl import cli

# What the main thread is doing, by the innermost of these functions that it is in.
PHASES = {
    "write_records": "teacher store",
    "write_examples": "memory",
    "_remember": "memory",
    "_forget_unneeded": "memory",
    "_save": "checkpoint",
    "wait": "checkpoint",
    "bring_down": "download",
    "stage": "upload",
    "finish": "upload",
    "latest_whole": "resuming",
    "_restore": "resuming",
    "_open_sinks": "resuming",
    "train_task": "training",
    "_prepare": "before a task",
    "_conclude": "after a task",
    "_evaluate": "evaluation",
    "_report": "report",
    "claim": "start-up",
    "build": "start-up",
}
# In the folder of a run whose output is a URL: the folder that plays the storage, and the local one.
BUCKET, LOCAL = "bucket", "local"
_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree"}


class Doom(NamedTuple):
    """When a process dies: before its n-th file operation in the run folder, or after seconds."""

    kind: Literal["file", "time"]
    at: float


class _Fate:
    """Counts file operations in a folder, and kills this process when it is time."""

    def __init__(self, folder: Path, doom: Doom | None, note: Path) -> None:
        self.count, self._folder, self._doom, self._note = 0, f"{folder}/", doom, note
        if doom is not None and doom.kind == "time":
            threading.Thread(target=self._wait, daemon=True).start()
        sys.addaudithook(self._seen)

    def _seen(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or not arguments or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if not (isinstance(path, str) and f"{path}/".startswith(self._folder)):
            return
        self.count += 1
        if self._doom is not None and self._doom.kind == "file" and self.count >= self._doom.at:
            self._die(_phase_of(path.removeprefix(self._folder)))

    def _wait(self) -> None:
        assert self._doom is not None
        time.sleep(self._doom.at)
        self._die()

    def _die(self, phase: str | None = None) -> None:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None and frame.f_code.co_name not in PHASES:
            frame = frame.f_back
        doing = PHASES[frame.f_code.co_name] if frame is not None else "start-up"
        self._note.write_text(doing if phase is None or doing == "download" else phase)
        os.kill(os.getpid(), signal.SIGKILL)


def _phase_of(name: str) -> str | None:
    """What a file is written or read for, whatever the main thread does meanwhile; `None` if that is what counts."""
    if name.startswith((f"{BUCKET}/", f"{LOCAL}/.mirror/")):
        return "upload"
    return "checkpoint" if name.removeprefix(f"{LOCAL}/").startswith("checkpoints/") else None


def member(
    folder: str,
    doom: Doom | None,
    note: str,
    *,
    command: Callable[[], int],
    environment: Mapping[str, str],
) -> None:
    """Runs a command in this process; the exit code is the command's.

    Args:
      folder: the folder that the command writes to.
      doom: when it dies, if it does.
      note: file for the phase in which it died, or else for the number of file operations; beside it, what it says.
      command: what it does.
      environment: variables that say which process of a run this is.
    """
    os.environ.update(environment)
    log = os.open(f"{note}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    fate = _Fate(Path(folder), doom, Path(note))
    code = command()
    Path(note).write_text(str(fate.count))
    sys.exit(code)


def run(config: str, reports: bool) -> int:
    """`jaxcl run`, perhaps without a report at the end."""
    if not reports:
        from jaxcl.run import sequence

        sequence.write_report = lambda folder: folder / "report.html"  # type: ignore[assignment]
    return cli.main(["run", config])
