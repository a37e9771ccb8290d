"""Reads the states at a URL and brings them down; nothing but what a whole state names is used."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from jaxcl.data.files import write_json
from jaxcl.errors import UserError
from jaxcl.run.folder import MIRROR, RunFolder
from jaxcl.run.remote.objects import Objects, each
from jaxcl.run.remote.state import FOLDER, Damaged, File, State, measure, number_of

WORK = ".mirror"
"""The folder in a local folder for what is on its way."""
_REMEMBERED = 64
# A summary needs no arrays; of larger files there it takes the size alone.
_SKETCHED_BYTES = 1 << 20
_SKETCHED = ("checkpoints/", "teacher/", "memory/")


class Found(NamedTuple):
    """The states at a URL.

    Attributes:
      states: those that can be read, the newest first.
      damaged: a line about each of the others.
      last: the highest number of all; 0 without any.
    """

    states: list[State]
    damaged: list[str]
    last: int


def local_folder(url: str, chosen: str | None = None) -> Path:
    """The local folder of a run whose output is a URL.

    Args:
      url: the output.
      chosen: the configuration's `local_output`; by default it is in the user's cache folder.
    """
    if chosen is not None:
        return Path(chosen)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxcl" / "runs"
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    return cache / f"{re.sub('[^A-Za-z0-9_.-]+', '-', url.rstrip('/')).strip('-.')[-60:]}-{digest}"


def read_states(objects: Objects) -> Found:
    """The states at a URL, without a look at what they name.

    Raises:
      UserError: they cannot be read, or were written by a later version.
    """
    found = Found([], [], 0)
    names = sorted((name for name in objects.names(FOLDER) if number_of(name) >= 0), key=number_of, reverse=True)
    for name in names:
        try:
            found.states.append(State.decode(objects.read(name), f"{objects.url}/{name}"))
        except Damaged as error:
            found.damaged.append(str(error))
        except FileNotFoundError:  # a newer one has taken its place since
            continue
    return found._replace(last=number_of(names[0]) if names else 0)


def bring_down(objects: Objects, local: Path, found: Found) -> list[State]:
    """Makes a local folder what the newest whole state is; prints a line about each that is not whole.

    Args:
      objects: what is at the URL.
      local: the local folder. Whatever else is in it is removed, but for its lock.
      found: the states; at least one.

    Returns:
      That state and those before it.

    Raises:
      UserError: none is whole, or the storage cannot be read.
    """
    lines = list(found.damaged)
    for index, state in enumerate(found.states):
        try:
            _bring_down(objects, local, state)
        except Damaged as error:
            lines.append(str(error))
            continue
        for line in lines:
            print(f"{line}; state {state.number} is used", file=sys.stderr)
        return found.states[index:]
    raise UserError(f"{lines[0]}; no state of {objects.url} is whole")


def read_record(local: Path) -> dict[str, Any] | None:
    """Of which URL and states a folder is a copy (`url`, `states`), and whether it was completed (`whole`).

    Raises:
      UserError: its record cannot be used.
    """
    path = local / MIRROR
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"url": str(record["url"]), "states": list(map(str, record["states"])), "whole": record["whole"] is True}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{path}: is damaged; remove {local}, which is a copy of what a URL holds") from None


def write_record(local: Path, url: str, states: Sequence[str], *, whole: bool) -> None:
    """Notes of which URL and states a folder is a copy; see `read_record`."""
    write_json(local / MIRROR, {"url": url, "states": list(states)[-_REMEMBERED:], "whole": whole})


def local_copy(url: str) -> Path:
    """The local folder of a run at a URL, for commands that read it; its newest whole state is brought down first.

    Args:
      url: the URL of a run.

    Raises:
      UserError: there is no run at the URL, or it cannot be read.
    """
    objects, local = Objects(url), local_folder(url)
    folder = RunFolder(local)
    try:
        folder.lock()
    except UserError:
        record = read_record(local)
        if record is not None and record["whole"] and folder.is_run:  # a run is working there, on what is the newest
            return local
        raise
    try:
        for last in (False, True):
            found = _some(objects)
            record = read_record(local)
            if record is not None and record["whole"] and found.states[0].identity in record["states"]:
                break
            try:
                bring_down(objects, local, found)
                break
            except UserError:
                if last or read_states(objects).last == found.last:  # not removed under our hands by a newer state
                    raise
    finally:
        folder.release()
    return local


@contextmanager
def sketch(url: str) -> Iterator[Path]:
    """A temporary folder to summarise a run at a URL from, in which large files are holes of the right size.

    Raises:
      UserError: there is no run at the URL, or it cannot be read.
    """
    objects = Objects(url)
    with TemporaryDirectory(prefix="jaxcl") as folder:
        state = _some(objects).states[0]

        def place(inner: str) -> None:
            file, path = state.files[inner], Path(folder) / inner
            if inner.startswith(_SKETCHED) and file.size > _SKETCHED_BYTES:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                os.truncate(path, file.size)
                os.utime(path, (file.changed, file.changed))
            else:
                _fetch(objects, inner, file, path)

        each(place, state.files)
        yield Path(folder)


def _some(objects: Objects) -> Found:
    found = read_states(objects)
    if not found.states:
        raise UserError(found.damaged[0] if found.damaged else f"{objects.url}: there is no run")
    return found


def _bring_down(objects: Objects, local: Path, state: State) -> None:
    write_record(local, objects.url, [], whole=False)
    shutil.rmtree(local / WORK, ignore_errors=True)
    for path in sorted(local.rglob("*"), reverse=True):  # what is in a folder before the folder
        name = path.relative_to(local).as_posix()
        if name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif name not in state.files:
            path.unlink()
    each(lambda name: _place(objects, local, name, state.files[name]), state.files)
    write_record(local, objects.url, [state.identity], whole=True)


def _place(objects: Objects, local: Path, name: str, file: File) -> None:
    path = local / name
    if path.is_file() and not path.is_symlink() and path.stat().st_size == file.size and measure(path)[:2] == file[:2]:
        return
    coming = local / WORK / f"{file.digest[:32]}.{name.replace('/', '%')[-64:]}"
    _fetch(objects, name, file, coming)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(coming, path)


def _fetch(objects: Objects, name: str, file: File, to: Path) -> None:
    """Copies the content of a state's file into a local one, and compares it with its digest."""
    where = f"{objects.url}/{file.place(name)}"
    try:
        objects.fetch(file.place(name), to)
    except FileNotFoundError:
        raise Damaged(f"{where} is missing") from None
    if measure(to)[:2] != file[:2]:
        raise Damaged(f"{where} is damaged")
    os.utime(to, (file.changed, file.changed))
