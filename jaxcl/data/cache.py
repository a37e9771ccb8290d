"""A folder of files that can be computed again: each is complete or absent, and several programs may share it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxcl.data.files import reason, write_json
from jaxcl.data.workers import in_workers
from jaxcl.errors import UserError

#: Raise it when the meaning of what is stored changes.
VERSION = 1
#: Names another cache folder than the user's.
VARIABLE = "JAXCL_DATA_CACHE"
_COMPLETE = "complete.json"
# Temporary files older than this belong to a program that was killed.
_STALE_SECONDS = 24 * 3600.0


class Share:
    """Which part of common work a process does; here: all of it, because there is one process.

    Attributes:
      index: number of the process.
      count: number of processes.
    """

    index = 0
    count = 1

    def agree(self, found: bool) -> bool:
        """Whether it is so in every process."""
        return found

    def together(self, action: Callable[[], object]) -> None:
        """Runs an action in every process and waits for all; an error of one is raised in all."""
        action()


class Cache:
    """Files by the key of what they hold.

    Attributes:
      folder: where they are.
      share: this process's part of the work.
    """

    def __init__(self, folder: str | Path | None = None, share: Share | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder else default_folder()
        self.share = share or Share()

    def build(
        self, kind: str, key: Mapping[str, Any], parts: int, make: Callable[[int, Path], None], suffix: str
    ) -> list[Path]:
        """The files of a key; what is missing is made.

        Each part is written to a file of its own and renamed when it is complete, so that an interruption loses one
        part at most. Processes make different parts. Where they do not share the folder, each makes all of them.

        Args:
          kind: what the files are, the name of a folder.
          key: everything that their content follows from, as JSON.
          parts: number of files.
          make: writes part number `i` to a path; picklable, as workers call it where there are cores for several.
          suffix: of the files' names.

        Returns:
          The paths, in the order of the parts.

        Raises:
          UserError: the folder cannot be written.
        """
        content = json.dumps({"version": VERSION, **key}, sort_keys=True)
        folder = self.folder / kind / hashlib.sha256(content.encode()).hexdigest()[:32]
        paths = [folder / f"part-{number:05}{suffix}" for number in range(parts)]
        if self.share.agree(_is_complete(folder, paths)):
            return paths

        def mine() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_unusable(folder, paths)
            missing(range(self.share.index, parts, self.share.count))

        def missing(numbers: Iterable[int]) -> None:
            left = [(number, paths[number]) for number in numbers if not paths[number].exists()]
            in_workers(functools.partial(_make, make), left)

        def rest() -> None:
            missing(range(parts))
            sizes = [path.stat().st_size for path in paths]
            write_json(folder / _COMPLETE, {"key": json.loads(content), "sizes": sizes})

        try:
            self.share.together(mine)
            self.share.together(rest)
        except OSError as error:
            raise UserError(
                f"data.cache {self.folder}: cannot write {folder}: {reason(error)}; what is complete is kept; choose "
                "another folder with data.cache"
            ) from error
        return paths


def agreed(cache: Cache | None, found: bool) -> bool:
    """Whether something is so in every process that shares a cache; without one, whether it is so here.

    Processes that find different things in copies of their own then take the same way, and the difference is found
    when fingerprints are compared.
    """
    return found if cache is None else cache.share.agree(found)


def default_folder() -> Path:
    """The cache folder unless `data.cache` names one: `jaxcl/data` in the user's cache folder."""
    if found := os.environ.get(VARIABLE):
        return Path(found).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxcl" / "data"


def _sizes(folder: Path) -> list[int] | None:
    """Sizes that the files should have; none if they are not complete."""
    try:
        return list(json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))["sizes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_complete(folder: Path, paths: list[Path]) -> bool:
    try:
        return _sizes(folder) == [path.stat().st_size for path in paths]
    except OSError:
        return False


def _make(make: Callable[[int, Path], None], part: tuple[int, Path]) -> None:
    number, path = part
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        make(number, temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_unusable(folder: Path, paths: list[Path]) -> None:
    """Removes files that were cut since they were written, and what a program that was killed has left."""
    for path, size in zip(paths, _sizes(folder) or [], strict=False):
        if path.exists() and path.stat().st_size != size:
            path.unlink(missing_ok=True)
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
