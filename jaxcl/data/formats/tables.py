"""Tables as text: CSV, whose fields may be in quotation marks, and TSV, where quotation marks mean nothing."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator

from jaxcl.data.formats.base import Numbering, Part, Record, Where
from jaxcl.data.formats.lines import line_lists, numbering_of, texts
from jaxcl.errors import UserError

# A longer field is an error: a quotation mark that is never closed would take in the rest of the file.
_LONGEST = 2**26


def read_csv(part: Part) -> Iterator[tuple[Where, Record]]:
    """The rows of a CSV file with a header, as records of text; each is placed by the line that it begins in.

    Args:
      part: the file, whole: the ends of rows are only known by reading from the start.

    Raises:
      UserError: there is no header, a row has another number of fields, a quotation mark is not closed, or the text is
        not UTF-8.
    """
    numbering = numbering_of(part)
    if csv.field_size_limit() < _LONGEST:  # for the whole process: the default, 131072, is too little for documents
        csv.field_size_limit(_LONGEST)
    lines = (line for text in texts(part, numbering) for line in io.StringIO(text, newline=""))
    rows = csv.reader(lines, strict=True)
    begins = 1

    def numbered() -> Iterator[tuple[int, list[str]]]:
        nonlocal begins
        for row in rows:
            yield begins, row
            begins = rows.line_num + 1

    try:
        yield from _records(numbering, numbered())
    except csv.Error as error:
        hint = "; is a quotation mark not closed?" if re.search("end of data|field limit", str(error)) else ""
        raise UserError(f"{numbering.at(begins)} is not valid CSV: {error}{hint}") from error


def read_tsv(part: Part) -> Iterator[tuple[Where, Record]]:
    """The rows of a TSV file with a header, as records of text: a row per line, fields between tabs.

    Args:
      part: the file, whole.

    Raises:
      UserError: there is no header, a row has another number of fields, or the text is not UTF-8.
    """
    numbering = numbering_of(part)
    rows = (line.split("\t") if line else [] for lines in line_lists(part, numbering) for line in lines)
    yield from _records(numbering, enumerate(rows, 1))


def _records(numbering: Numbering, rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[Where, Record]]:
    """Records from rows with their line numbers; the first row that is not blank is the header."""
    names: list[str] | None = None
    for number, row in rows:
        if not row:
            continue
        if names is None:
            names = _header(numbering.at(number), row)
        elif len(row) != len(names):
            fields = "1 field" if len(row) == 1 else f"{len(row)} fields"
            raise UserError(f"{numbering.at(number)} has {fields}; the header has {len(names)}: {', '.join(names)}")
        else:
            yield Where((numbering, number)), dict(zip(names, row, strict=True))
    if names is None:
        raise UserError(f"{numbering.path} is empty; expected a header line with the names of the fields")


def _header(where: str, row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    counts = Counter(names)
    twice = next((name for name in names if counts[name] > 1), None)
    if twice is not None or not any(names):
        wrong = f"names the field {twice!r} twice" if twice else "has fields without a name"
        raise UserError(f"{where} {wrong}; expected a header with the names of the fields")
    return names
