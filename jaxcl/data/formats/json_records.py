"""Records in JSON: an object per line, or one list of objects; the content tells which, not the file's name."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from jaxcl.data.files import parse_json, split_lines
from jaxcl.data.formats import streams
from jaxcl.data.formats.base import Numbering, Part, Record, Where
from jaxcl.data.formats.lines import line_ends, line_lists, line_parts, not_utf8, numbering_of, without_mark
from jaxcl.data.values import json_kind
from jaxcl.errors import UserError

_SPACE = re.compile(r"[ \t\n\r]*")
# An error this close to the end of what was read may come from a value that is cut there.
_CUT = 16


def json_parts(path: str) -> list[Part]:
    """The parts of a file: ranges of bytes, or the whole file if it is a list or compressed."""
    parts = line_parts(path)
    return [Part(path)] if len(parts) > 1 and _is_list(path) else parts


def read_json_records(part: Part) -> Iterator[tuple[Where, Record]]:
    """The objects of a part.

    Raises:
      UserError: something is not JSON, or not an object; or the file cannot be read.
    """
    if part.start == 0 and _is_list(part.path):
        return _list_items(part.path)
    return _line_objects(part)


def _is_list(path: str) -> bool:
    starts = (start for block in without_mark(streams.blocks(path)) if (start := block.lstrip()))
    return next(starts, b"").startswith(b"[")


# ---------------------------------------------------------------- an object per line


def _line_objects(part: Part) -> Iterator[tuple[Where, Record]]:
    numbering = numbering_of(part)
    decode = json.JSONDecoder().raw_decode
    before = 0
    for lines in line_lists(part, numbering):
        for number, line in enumerate(lines, before + 1):
            if not line or line.isspace():
                continue
            try:
                record, end = decode(line)
            except (ValueError, RecursionError):
                end = -1
            if end != len(line):  # also if there is white space around the object
                record = _parse_line(line, numbering, number)
            if type(record) is not dict:
                raise UserError(f"{numbering.at(number)}: expected a JSON object, got {json_kind(record)}")
            yield Where((numbering, number)), record
        before += len(lines)


def _parse_line(line: str, numbering: Numbering, number: int) -> Any:
    """Parses a line for which the fast way failed; errors name file, line and column."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        at = numbering.number(number)
    try:
        return parse_json(line, numbering.path, at)
    except UserError as error:
        hint = "; expected an object per line, or one list of objects" if at == 1 else ""
        raise UserError(f"{error}{hint}") from error


# ---------------------------------------------------------------- a list of objects


def _list_items(path: str) -> Iterator[tuple[Where, Record]]:
    """The objects of a list, of which no more is in memory than a few blocks or one object."""
    numbering = Numbering(path, "row")
    text = _Window(path)
    text.skip("[")
    number = 0
    if text.next() == "]":
        text.skip("]")
    else:
        while True:
            number += 1
            record = text.value(number)
            if type(record) is not dict:
                raise UserError(f"{numbering.at(number)}: expected a JSON object, got {json_kind(record)}")
            yield Where((numbering, number)), record
            if text.next() == "]":
                text.skip("]")
                break
            text.skip(",")
    if text.next():
        raise text.error("extra data after the list")


class _Window:
    """The text of a file of JSON, of which only the present value and what was read behind it are in memory."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._chunks = _chunks(path)
        self._text, self._at, self._dropped, self._whole = "", 0, 0, False
        self._decode = json.JSONDecoder().raw_decode

    def next(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self, character: str) -> None:
        """Goes on behind the next character, which must be this one."""
        if self.next() != character:
            wanted = "[" if character == "[" else "',' or ']'"
            raise self.error(f"expected {wanted}" + ("" if self.next() else ", but the file ends"))
        self._at += 1

    def value(self, number: int) -> Any:
        """The next value, which is the one with this number in the list."""
        self.next()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
                if end < len(self._text) or not self._more():  # a number may go on
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.pos > len(self._text) - _CUT or error.msg.startswith("Unterminated string")
                ahead = error.pos - self._at
                if not cut or not self._more():
                    self._at += ahead
                    raise self.error(error.msg) from error
            except ValueError as error:  # Python reads no whole number of more than 4300 digits
                raise self._unusable(number, "a number has too many digits") from error
            except RecursionError as error:
                raise self._unusable(number, "nested too deeply") from error

    def error(self, message: str) -> UserError:
        """An error at the present character; finds its line and column by reading the file again."""
        line, column, left, half = 1, 1, self._dropped + self._at, ""
        for chunk in _chunks(self._path):
            text = half + chunk[:left]
            left -= len(chunk)
            half = "\r" if left > 0 and text.endswith("\r") else ""  # perhaps half of a line end
            *ended, last = split_lines(text.removesuffix(half))
            line += len(ended)
            column = len(last) + 1 if ended else column + len(last)
            if left <= 0:
                break
        return UserError(f"{self._path} line {line} column {column} is not valid JSON: {message}")

    def _unusable(self, number: int, message: str) -> UserError:
        return UserError(f"{self._path} row {number} is not usable JSON: {message}")

    def _more(self) -> bool:
        """Reads on, at least as much again as is kept; false at the end of the file."""
        kept = self._text[self._at :]
        self._dropped += self._at
        added: list[str] = []
        wanted = len(kept)
        if wanted > streams.LONGEST:
            raise self.error(f"a value has more than {streams.LONGEST // 2**20} million characters")
        for chunk in self._chunks:
            added.append(chunk)
            wanted -= len(chunk)
            if wanted <= 0:
                break
        self._text, self._at = "".join((kept, *added)), 0
        return bool(added)


def _chunks(path: str) -> Iterator[str]:
    """The text of a file, cut anywhere.

    Raises:
      UserError: it is not UTF-8 text, or the file cannot be read.
    """
    numbering = Numbering(path, "line")
    decoder = codecs.getincrementaldecoder("utf-8")()
    before, returned = 0, False
    for block in without_mark(streams.blocks(path)):
        kept = decoder.getstate()[0]
        before -= returned and block.startswith(b"\n")  # one line end, cut in two
        returned = block.endswith(b"\r")
        try:
            if text := decoder.decode(block):
                yield text
        except UnicodeDecodeError as error:
            raise UserError(not_utf8(numbering, before, kept + block, error.start)) from error
        before += line_ends(block)
    if kept := decoder.getstate()[0]:
        raise UserError(not_utf8(numbering, before, kept, 0))
