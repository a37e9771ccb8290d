r"""Lines of text: cut at `\n`, `\r\n` and `\r` only, from a whole file or a range of its bytes.

A line belongs to the range in which it begins, so ranges that cover a file give each of its lines once, wherever they
are cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import BinaryIO

from jaxcl.data.formats import storage, streams
from jaxcl.data.formats.base import Numbering, Part
from jaxcl.errors import UserError

#: Bytes of a range that is read at once.
RANGE = 32 * 2**20
_END = re.compile(rb"\r\n|\r|\n")
_MARK = b"\xef\xbb\xbf"


class _TooLongError(Exception):
    """A line has more bytes than it may have."""


def line_parts(path: str) -> list[Part]:
    """The parts of a file of lines: ranges of about 32 MiB; the whole file if it is compressed."""
    size = storage.stat(path).size
    if size <= RANGE or streams.compression(path):
        return [Part(path)]
    starts = range(0, size, RANGE)
    return [Part(path, start, start + RANGE if start + RANGE < size else None) for start in starts]


def numbering_of(part: Part) -> Numbering:
    """Names the lines of a part by their numbers in the whole file."""
    return Numbering(part.path, "line", partial(_lines_before, part.path, part.start))


def part_blocks(part: Part) -> Iterator[bytes]:
    """The bytes of the lines that begin in a part, block by block, without a byte-order mark at the file's start."""
    if part.start == 0 and part.stop is None:
        found = streams.blocks(part.path)
    else:
        found = _range(part.path, part.start, part.stop)
    return without_mark(found) if part.start == 0 else found


def without_mark(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes without a byte-order mark at the start."""
    head = b""
    for block in blocks:
        head += block
        if len(head) >= len(_MARK):
            break
    if head := head.removeprefix(_MARK):
        yield head
    yield from blocks


def whole_lines(blocks: Iterable[bytes], longest: int | None = None) -> Iterator[bytes]:
    r"""Cuts blocks anew so that each ends at the end of a line, never within `\r\n`; the last may lack its end."""
    kept: list[bytes] = []  # the beginning of a line, which may be longer than a block
    size = 0
    for block in blocks:
        if kept and kept[-1].endswith(b"\r"):  # only now it is known whether a line feed follows
            if block.startswith(b"\n"):
                kept.append(b"\n")
                block = block[1:]
            yield b"".join(kept)
            kept = []
        cut = max(block.rfind(b"\n"), block.rfind(b"\r", 0, -1)) + 1
        if cut:
            yield b"".join((*kept, block[:cut]))
            kept = []
        if cut < len(block):
            kept.append(block[cut:])
        size = len(block) - cut if cut or len(kept) == 1 else size + len(block)
        if longest is not None and size > longest:
            raise _TooLongError
    if kept:
        yield b"".join(kept)


def texts(part: Part, numbering: Numbering) -> Iterator[str]:
    """The text of the lines of a part, in blocks of whole lines, with their ends as they are.

    Raises:
      UserError: a line is not UTF-8 text, holds a NUL byte or has more than `streams.LONGEST` bytes; or the file
        cannot be read.
    """
    before = 0
    try:
        for block in whole_lines(part_blocks(part), streams.LONGEST):
            try:
                text = block.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(not_utf8(numbering, before, block, error.start)) from error
            if (nul := block.find(b"\0")) >= 0:
                number = before + line_ends(block[:nul]) + 1
                raise UserError(f"{numbering.at(number)} holds a NUL byte; expected UTF-8 text")
            yield text
            before += line_ends(block)
    except _TooLongError:
        raise UserError(f"{numbering.at(before + 1)} has more than {streams.LONGEST // 2**20} MiB") from None


def line_lists(part: Part, numbering: Numbering) -> Iterator[list[str]]:
    """The lines of a part without their ends, in lists; together the nth is line n of `numbering`.

    Raises:
      UserError: see `texts`.
    """
    for text in texts(part, numbering):
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        lines = text.split("\n")
        if not lines[-1]:
            lines.pop()
        yield lines


def not_utf8(numbering: Numbering, before: int, block: bytes, start: int) -> str:
    """What to say of text whose byte `start` in `block` is not UTF-8, where `before` lines end before the block."""
    number = before + line_ends(block[:start]) + 1
    utf16 = numbering.number(number) == 1 and block[:2] in (b"\xff\xfe", b"\xfe\xff")
    return f"{numbering.at(number)} is not UTF-8 text" + (" but UTF-16; convert the file" if utf16 else "")


def line_ends(content: bytes) -> int:
    r"""Number of line ends in some bytes, which are not cut within `\r\n`."""
    if b"\r" not in content:
        return content.count(b"\n")
    return content.count(b"\n") + content.count(b"\r") - content.count(b"\r\n")


def _range(path: str, start: int, stop: int | None) -> Iterator[bytes]:
    with storage.naming(path), closing(storage.open_binary(path)) as file:
        end = None if stop is None else _first_line(file, stop)
        at = _first_line(file, start)
        file.seek(at)
        while end is None or at < end:
            block = file.read(streams.BLOCK if end is None else min(streams.BLOCK, end - at))
            if not block:
                return
            at += len(block)
            yield block


def _first_line(file: BinaryIO, start: int) -> int:
    """Where the first line begins that begins at byte `start` or after it; the file's size if there is none."""
    if start == 0:
        return 0
    at = start - 1  # the end of the line before may be there, or begin there
    file.seek(at)
    tail = b""
    while block := file.read(min(streams.BLOCK, 2**16)):
        found = _END.search(tail + block)
        # A carriage return at the end of what was read may be followed by a line feed.
        if found and not (found[0] == b"\r" and found.end() == len(tail + block)):
            return at - len(tail) + found.end()
        at += len(block)
        tail = b"\r" if block.endswith(b"\r") else b""
    return at


def _lines_before(path: str, start: int) -> int:
    """Number of lines that begin before byte `start`."""
    if start == 0:
        return 0
    return sum(line_ends(block) for block in whole_lines(_range(path, 0, start)))
