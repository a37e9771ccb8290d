"""Reading and writing files: writes are atomic, and errors say what the user can do."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from jaxcl.errors import UserError

# Bytes that text may have which was gzip, or how many times as many; text has seldom more than ten times as many.
_UNPACKED, _TIMES = 2**28, 100


def reason(error: OSError) -> str:
    """The operating system's message for `error`, without the path."""
    return (error.strerror or type(error).__name__).lower()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the folder of `path` and renames it to `path` at the end.

    If the block fails, `path` is unchanged and the temporary file is removed.

    Raises:
      UserError: the folder cannot be created or is read-only, or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A unique name per writer: two processes that write the same file must not share a temporary file.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; the previous file is intact") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a file, atomically and not through a link.

    Raises:
      UserError: the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as JSON, atomically. Half of a surrogate pair, which UTF-8 does not have, is escaped.

    Raises:
      UserError: the file cannot be written.
    """
    text = json.dumps(value, ensure_ascii=False, indent=1)
    if any("\ud800" <= character <= "\udfff" for character in text):
        text = json.dumps(value, indent=1)
    write_text(path, text + "\n")


def open_end(path: str | Path) -> IO[bytes]:
    """Opens a file to write behind its end; each write is in it at once.

    Raises:
      UserError: the file cannot be written, or is a link: what it leads to may belong to somebody else.
    """
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        return os.fdopen(file, "ab", buffering=0)
    except OSError as error:
        words = "it is a link" if error.errno == errno.ELOOP and Path(path).is_symlink() else error.strerror
        raise UserError(f"{path}: cannot be written: {words}") from error


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
      UserError: the file is missing, unreadable or not UTF-8.
    """
    path = Path(path)
    with _reading(path):
        return _decoded(path.read_bytes(), path)


def read_data_text(path: str | Path) -> str:
    """The text of a UTF-8 file of data, plain or gzip (recognised by its first bytes).

    Raises:
      UserError: the file is missing, unreadable, damaged or not UTF-8, or gzip of more than 256 MiB and 100 times its
        own size.
    """
    path = Path(path)
    with _reading(path), path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            return _decoded(file.read(), path)
        most = max(_UNPACKED, _TIMES * path.stat().st_size)
        content = gzip.GzipFile(fileobj=file).read(most + 1)
    if len(content) > most:
        raise UserError(f"{path} would be more than {most // 2**20:,} MiB of text, decompressed")
    return _decoded(content, path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {line} is not UTF-8 text") from error


def split_lines(text: str) -> list[str]:
    r"""The lines of a text, without their ends: `\n`, `\r\n` or `\r`, and nothing else.

    `str.splitlines` also cuts at form feeds, U+0085, U+2028 and others, which occur within passages.

    >>> split_lines("one\u2028line\r\ntwo\n")
    ['one\u2028line', 'two', '']
    """
    return re.split("\r\n|\r|\n", text)


def parse_json(text: str, path: str | Path, first_line: int = 1) -> Any:
    """Parses JSON; an error names `path` and the line, counted from `first_line`.

    Raises:
      UserError: the text is not JSON, is nested too deeply, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path} line {line} column {error.colno} is not valid JSON: {error.msg}") from error
    except ValueError as error:  # Python reads no whole number of more than 4300 digits
        raise UserError(f"{path} line {first_line} is not usable JSON: a number has too many digits") from error
    except RecursionError as error:
        raise UserError(f"{path} line {first_line} is not usable JSON: nested too deeply") from error
