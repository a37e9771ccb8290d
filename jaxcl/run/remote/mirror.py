"""Keeps at a URL what a local run folder holds; see `jaxcl.run.remote`."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxcl.errors import UserError
from jaxcl.run.folder import MIRROR
from jaxcl.run.remote.claim import Claim
from jaxcl.run.remote.objects import Objects, each
from jaxcl.run.remote.reading import WORK, bring_down, read_record, read_states, write_record
from jaxcl.run.remote.state import FILES, FOLDER, File, State, measure, names_in, number_of

_KEPT = 2
# Never changed once they are there, so that a second name is as good as a copy.
_LASTING = ("checkpoints/", "teacher/", "memory/")
_OWN = {MIRROR, WORK, ".lock"}


class Mirror:
    """A local run folder, and its copy at a URL that this process alone writes.

    Attributes:
      url: the URL.
      local: the local folder.
    """

    def __init__(self, url: str, local: Path) -> None:
        """Opens the URL's file system.

        Raises:
          UserError: its driver is not installed.
        """
        self.url, self.local = url.rstrip("/"), local
        self._objects = Objects(url)
        self._claim = Claim(self._objects)
        self._states: list[State] = []  # those to be kept, the newest first
        self._last = 0  # the highest number of a state at the URL
        self._measured: dict[str, tuple[tuple[int, ...], File]] = {}
        self._staged = 0

    def open(self) -> None:
        """Claims the URL, and brings down its newest whole state if the local folder is not as new.

        Raises:
          UserError: another run writes there; no state is whole; the folder holds something else; or the storage cannot
            be read or written.
        """
        self._claim.take()
        try:
            self._begin()
        except BaseException:
            self._claim.release()
            raise

    def close(self) -> None:
        """Gives the claim back."""
        self._claim.release()

    def stage(self) -> Path:
        """A copy of the folder as it is now, for `upload`. Nothing but temporary files may be written meanwhile."""
        self._staged += 1
        stage = self.local / WORK / str(self._staged)
        for name in names_in(self.local):
            _keep(self.local, stage, name)
        return stage

    def add(self, stage: Path, checkpoint: int) -> None:
        """Adds to a stage a checkpoint that was not complete when it was taken, and is now."""
        for name in names_in(self.local, f"checkpoints/{checkpoint}"):
            _keep(self.local, stage, name)

    def upload(self, stage: Path) -> None:
        """Puts a state at the URL, then removes what belongs to none of the last two; the stage is used up.

        Raises:
          UserError: another run has taken over the URL, or it cannot be written; the states before are intact.
        """
        try:
            files = {name: self._measure(stage, name) for name in sorted(names_in(stage))}
            if not self._states or _contents(self._states[0].files) != _contents(files):
                self._put(stage, files)
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _begin(self) -> None:
        shutil.rmtree(self.local / WORK, ignore_errors=True)
        found, record = read_states(self._objects), read_record(self.local)
        self._states, self._last = found.states[:_KEPT], found.last
        if record is not None and record["url"] != self.url:
            raise UserError(f"{self.local}: is the local folder of {record['url']}; name another local_output")
        if not found.states:
            if found.damaged:
                raise UserError(f"{found.damaged[0]}; no state of {self.url} is whole")
            self._note()
        elif record is None and self.local.is_dir() and any(path.name not in _OWN for path in self.local.iterdir()):
            raise UserError(
                f"{self.local}: contains files that are not from {self.url}; name another local_output, or an empty "
                "folder"
            )
        elif record is None or not record["whole"] or found.states[0].identity not in record["states"]:
            self._states = bring_down(self._objects, self.local, found)[:_KEPT]
        # What a run that was killed had put there for a state that it did not write.
        kept = _places(self._states)
        self._objects.remove(name for name in self._objects.names(FILES) if name not in kept)

    def _put(self, stage: Path, files: dict[str, File]) -> None:
        known = _places(self._states)
        new = {file.place(name): stage / name for name, file in files.items() if file.place(name) not in known}
        self._claim.check()
        each(lambda place: self._objects.store(place, new[place]), new)
        self._claim.check()
        self._last += 1  # also if it fails: it may be there all the same
        state = State(self._last, uuid.uuid4().hex, files)
        self._note(state.identity)  # before it is there, so that this folder is never taken for an older one
        self._objects.write(state.name, state.encode())
        if self._objects.read(state.name) != state.encode():
            raise UserError(f"cannot write {self.url}/{state.name}: other bytes arrived")
        former, self._states = self._states, [state, *self._states][:_KEPT]
        names = {one.name for one in self._states}
        self._objects.remove(one for one in self._objects.names(FOLDER) if one not in names and number_of(one) >= 0)
        self._objects.remove(_places(former) - _places(self._states))

    def _measure(self, stage: Path, name: str) -> File:
        if not name.startswith(_LASTING):
            return measure(stage / name)
        stat = (stage / name).stat()
        key = stat.st_ino, stat.st_size, stat.st_mtime_ns
        if name not in self._measured or self._measured[name][0] != key:
            self._measured[name] = key, measure(stage / name)
        return self._measured[name][1]

    def _note(self, *more: str) -> None:
        record = read_record(self.local)
        write_record(self.local, self.url, [*([] if record is None else record["states"]), *more], whole=True)


def _keep(local: Path, stage: Path, name: str) -> None:
    """A second name for a file that is never changed, a copy of any other one."""
    place = stage / name
    place.parent.mkdir(parents=True, exist_ok=True)
    if name.startswith(_LASTING):
        try:
            os.link(local / name, place)
            return
        except OSError:  # a file system without links
            pass
    shutil.copy2(local / name, place)


def _places(states: Iterable[State]) -> set[str]:
    return {file.place(name) for state in states for name, file in state.files.items()}


def _contents(files: Mapping[str, File]) -> dict[str, str]:
    return {name: file.digest for name, file in files.items()}
