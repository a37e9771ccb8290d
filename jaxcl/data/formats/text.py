"""Text files: a passage per line."""

from __future__ import annotations

from collections.abc import Iterator

from jaxcl.data.formats.base import Part, Record, Where
from jaxcl.data.formats.lines import line_lists, numbering_of


def read_text_lines(part: Part, field: str) -> Iterator[tuple[Where, Record]]:
    """The lines of a part that are not blank, without outer white space, as records of one field.

    Args:
      part: the part.
      field: name of the field.

    Raises:
      UserError: a line is not UTF-8 text or holds a NUL byte; or the file cannot be read.
    """
    numbering = numbering_of(part)
    before = 0
    for lines in line_lists(part, numbering):
        for number, line in enumerate(lines, before + 1):
            if passage := line.strip():
                yield Where((numbering, number)), {field: passage}
        before += len(lines)
