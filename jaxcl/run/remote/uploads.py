"""Uploads the states of a run in the background, each when its checkpoint is complete."""

from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from jaxcl.errors import UserError
from jaxcl.run.remote.claim import Overtaken
from jaxcl.run.remote.mirror import Mirror

_POLL = 0.05


class _Job(NamedTuple):
    """A stage, and the checkpoint that is to be added to it when it is complete."""

    stage: Path
    checkpoint: int | None


class Uploads:
    """The uploads of a run, on process 0. Without `open`, as in a local run, all methods do nothing.

    A state that waits for its turn gives way to a newer one. If one cannot be written, a line says so once, and
    training goes on: the next checkpoint is the next attempt. Use it as a context manager: its end waits for the last.
    """

    def __init__(self) -> None:
        self._mirror: Mirror | None = None
        self._stage: Path | None = None
        self._waiting: _Job | None = None
        self._busy = self._adding = self._closing = False
        self._fatal: UserError | None = None
        self._said: set[str] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def open(self, url: str, local: Path) -> None:
        """Begins to keep a local folder at a URL; see `Mirror.open`.

        Raises:
          UserError: see `Mirror.open`.
        """
        mirror = Mirror(url, local)
        mirror.open()
        self._mirror = mirror
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def __enter__(self) -> Uploads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mirror is None or self._thread is None:
            return
        with self._changed:
            if kind is not None and (self._busy or self._waiting is not None):
                print(f"uploading the last checkpoint to {self._mirror.url}", file=sys.stderr)
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._mirror.close()

    def stage(self) -> None:
        """Takes the folder as it is, just before a checkpoint is saved; the one before is complete.

        Raises:
          UserError: another run has taken over the URL.
        """
        if self._mirror is None:
            return
        if self._fatal is not None:
            raise self._fatal
        with self._changed:
            # The checkpoint of an earlier state is complete now, and may be removed after the next one.
            self._changed.wait_for(lambda: not self._adding)
            if self._waiting is not None and self._waiting.checkpoint is not None:
                self._mirror.add(self._waiting.stage, self._waiting.checkpoint)
                self._waiting = self._waiting._replace(checkpoint=None)
        self._stage = self._mirror.stage()

    def submit(self, checkpoint: int | None) -> None:
        """Uploads what was staged, and the checkpoint that is being saved, if any, as soon as that is complete."""
        if self._mirror is not None and self._stage is not None:
            with self._changed:
                former, self._waiting, self._stage = self._waiting, _Job(self._stage, checkpoint), None
                self._changed.notify_all()
            if former is not None:
                shutil.rmtree(former.stage, ignore_errors=True)

    def finish(self) -> None:
        """Uploads the folder as it is at the end.

        Raises:
          UserError: it could not be written, or another run has taken over the URL.
        """
        if self._mirror is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._busy and self._waiting is None)
        if self._fatal is not None:
            raise self._fatal
        try:
            self._mirror.upload(self._mirror.stage())
        except Overtaken:
            raise
        except UserError as error:
            raise UserError(f"{error}; the run is whole in {self._mirror.local}, run it again to upload it") from error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                job, self._waiting = self._waiting, None
                if job is None:
                    return
                self._busy = self._adding = True
            try:
                self._upload(job)
            except Overtaken as error:
                self._fatal = error
            except Exception as error:
                self._say(str(error) if isinstance(error, UserError) else repr(error))
            finally:
                with self._changed:
                    self._busy = self._adding = False
                    self._changed.notify_all()

    def _upload(self, job: _Job) -> None:
        assert self._mirror is not None
        if job.checkpoint is not None:
            place = self._mirror.local / "checkpoints" / str(job.checkpoint)
            while not place.is_dir():  # it appears under its number when it is complete
                with self._changed:
                    if self._closing and not place.is_dir():
                        return  # it could not be written, as the run says
                    self._changed.wait(_POLL)
            self._mirror.add(job.stage, job.checkpoint)
        with self._changed:
            self._adding = False
            self._changed.notify_all()
        self._mirror.upload(job.stage)

    def _say(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            print(f"{words}; the run goes on, and tries again with its next checkpoint", file=sys.stderr)
