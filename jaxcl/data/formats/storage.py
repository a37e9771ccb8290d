"""Files on disk or behind URLs of fsspec (`gs://`, `s3://`, `hf://`, ...), with errors in one line."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from jaxcl.data.files import reason
from jaxcl.errors import UserError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# What file systems call the time or the content of a file, in the order of what says most.
_STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "crc32c", "blob_id", "mtime", "LastModified", "last_modified",
           "updated", "last_commit", "created")  # fmt: skip


class Entry(NamedTuple):
    """A file or folder.

    Attributes:
      name: its name, without the folder.
      path: path or URL.
      folder: whether it is a folder.
    """

    name: str
    path: str
    folder: bool


class Stat(NamedTuple):
    """Size of a file in bytes, and what says when it changed; `changed` is empty if nothing says so."""

    size: int
    changed: str


def is_url(text: str) -> bool:
    """Whether a place is a URL, which is not a path of the file system.

    >>> is_url("gs://bucket/rows.jsonl"), is_url("C:/rows.jsonl"), is_url("rows.jsonl")
    (True, False, False)
    """
    return _URL.match(text) is not None


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Turns errors of reading a file or folder into one line that names it.

    Raises:
      UserError: the block raises an `OSError`; for URLs, whatever it raises: each file system has its own errors.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        detail = str(error) if is_url(path) and error.strerror is None else reason(error)
        raise UserError(f"cannot read {path}: {detail or type(error).__name__}") from error
    except Exception as error:
        if not is_url(path):
            raise
        raise UserError(f"cannot read {path}: {type(error).__name__}: {error}") from error


def what_is(path: str) -> Literal["file", "folder"] | None:
    """Whether a path or URL is a file, a folder, or nothing; for a URL that is nothing, an error says so."""
    with naming(path):
        if is_url(path):
            system, inner = file_system(path)
            return "folder" if system.info(inner)["type"] == "directory" else "file"
        return "folder" if os.path.isdir(path) else "file" if os.path.exists(path) else None


def entries(folder: str) -> list[Entry]:
    """What a folder holds, sorted by name; hidden files and those whose name begins with an underscore are left out."""
    with naming(folder):
        if is_url(folder):
            system, inner = file_system(folder)
            # Object stores also list the folder itself, if there is an empty object of its name.
            infos = (info for info in system.ls(inner, detail=True) if info["name"].strip("/") != inner.strip("/"))
            found = [_entry(system, info) for info in infos]
        else:
            found = [Entry(item.name, os.path.join(folder, item.name), item.is_dir()) for item in os.scandir(folder)]
    return sorted(entry for entry in found if entry.name and not entry.name.startswith((".", "_")))


def matches(pattern: str) -> list[Entry]:
    """What a glob matches (`*`, `?`, `[...]`, and `**` for any folders), sorted by path."""
    with naming(pattern):
        if is_url(pattern):
            system, inner = file_system(pattern)
            found = [_entry(system, info) for info in system.glob(inner, detail=True).values()]
        else:
            paths = glob.glob(pattern, recursive=True)
            found = [Entry(os.path.basename(path), path, os.path.isdir(path)) for path in paths]
    return sorted(found, key=lambda entry: entry.path)


def stat(path: str) -> Stat:
    """Size and change stamp of a file."""
    with naming(path):
        if is_url(path):
            system, inner = file_system(path)
            info = system.info(inner)
            stamp = next((f"{name} {info[name]}" for name in _STAMPS if info.get(name)), "")
            return Stat(int(info["size"]), stamp)
        found = os.stat(path)
        return Stat(found.st_size, str(found.st_mtime_ns))


def open_binary(path: str) -> BinaryIO:
    """Opens a file to read bytes."""
    with naming(path):
        if is_url(path):
            system, inner = file_system(path)
            return cast(BinaryIO, system.open(inner, "rb"))
        return open(path, "rb")


def join(folder: str, name: str) -> str:
    """A name in a folder, which may be a URL."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
      UserError: the driver of its scheme is not installed, or there is none.
    """
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    try:
        return url_to_fs(url)
    except ImportError as error:
        known = known_implementations.get(url.partition("://")[0], {})
        package = str(known.get("class", "")).partition(".")[0]
        named = f"the package {package}" if package not in ("", "fsspec") else "a package that is missing"
        raise UserError(f"{url} needs {named}: {error}") from error
    except ValueError as error:
        raise UserError(f"cannot read {url}: {error}") from error


def _entry(system: Any, info: dict[str, Any]) -> Entry:
    path = str(info["name"])
    return Entry(path.rstrip("/").rpartition("/")[2], str(system.unstrip_protocol(path)), info["type"] == "directory")
