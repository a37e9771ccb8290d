"""Objects at a URL: whole reads and writes, tried again when the network or the storage fails for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from jaxcl.data.formats.storage import file_system
from jaxcl.errors import UserError

Result = TypeVar("Result")
Item = TypeVar("Item")

ATTEMPTS = 5
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; twice as many before each further one."""
PARALLEL = 8
# What another attempt does not change. Drivers have errors of their own for the rest.
_LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, NotImplementedError, UserError)
# There, folders are only parts of names; asked for one, some drivers make a bucket.
_WITHOUT_FOLDERS = {"gs", "gcs", "s3", "s3a", "abfs", "az", "adl", "oss", "memory"}


class Objects:
    """The objects below a URL.

    Attributes:
      url: the URL.
    """

    def __init__(self, url: str) -> None:
        """Opens the file system of a URL.

        Raises:
          UserError: its driver is not installed.
        """
        self.url = url.rstrip("/")
        self._system, root = file_system(self.url)
        self._root = root.rstrip("/")
        self._folders = self.url.partition("://")[0] not in _WITHOUT_FOLDERS

    def read(self, name: str) -> bytes:
        """The content of an object.

        Raises:
          FileNotFoundError: there is none of this name.
          UserError: it cannot be read.
        """
        return bytes(self._try("read", name, lambda place: self._system.cat_file(place)))

    def fetch(self, name: str, to: Path) -> None:
        """Copies an object into a local file.

        Raises:
          FileNotFoundError: there is none of this name.
          UserError: it cannot be read.
        """
        to.parent.mkdir(parents=True, exist_ok=True)
        self._try("read", name, lambda place: self._system.get_file(place, str(to)))

    def write(self, name: str, content: bytes) -> None:
        """Writes an object in one piece.

        Raises:
          UserError: it cannot be written.
        """
        self._put(name, len(content), lambda place: self._system.pipe_file(place, content))

    def store(self, name: str, path: Path) -> None:
        """Copies a local file into an object.

        Raises:
          UserError: it cannot be written.
        """
        self._put(name, path.stat().st_size, lambda place: self._system.put_file(str(path), place))

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects that may be gone already. What cannot be removed stays."""
        each(self._remove, names)

    def names(self, folder: str) -> list[str]:
        """The names of all objects below a folder, sorted.

        Raises:
          UserError: they cannot be listed.
        """

        def find(place: str) -> list[str]:
            self._system.invalidate_cache()
            return list(self._system.find(place))

        try:
            found = self._try("list", folder, find)
        except FileNotFoundError:
            return []
        return sorted(str(name).strip("/").removeprefix(f"{self._root.strip('/')}/") for name in found)

    def _put(self, name: str, size: int, write: Callable[[str], object]) -> None:
        def put(place: str) -> None:
            try:
                write(place)
            except FileNotFoundError:
                if not self._folders:
                    raise
                self._system.makedirs(place.rpartition("/")[0], exist_ok=True)
                write(place)
            self._system.invalidate_cache()
            if (found := self._system.info(place)["size"]) != size:
                raise OSError(f"{found} bytes of {size} arrived")

        try:
            self._try("write", name, put)
        except FileNotFoundError as error:
            raise UserError(f"cannot write {self.url}/{name}: {_words(error)}") from error

    def _remove(self, name: str) -> None:
        try:
            self._system.rm_file(f"{self._root}/{name}")
        except Exception:  # gone already, or removed by the next run that begins here
            return

    def _try(self, verb: str, name: str, action: Callable[[str], Result]) -> Result:
        """An action with an object; one that fails for a while is tried again."""
        for attempt in range(ATTEMPTS):
            try:
                return action(f"{self._root}/{name}")
            except (FileNotFoundError, UserError):
                raise
            except Exception as error:
                if attempt == ATTEMPTS - 1 or isinstance(error, _LASTING):
                    raise UserError(f"cannot {verb} {self.url}/{name}: {_words(error)}") from error
            time.sleep(FIRST_PAUSE * 2**attempt)
        raise AssertionError("unreachable")


def each(action: Callable[[Item], object], items: Iterable[Item]) -> None:
    """Does something with each of several things, some at a time; after an error, no further one is begun."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        try:
            for one in as_completed([pool.submit(action, item) for item in items]):
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _words(error: Exception) -> str:
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
