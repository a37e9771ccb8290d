"""`rounds.jsonl` of a federated run: a row per round, and per exchange of what the method shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxcl.data.files import open_end, reason, replacing
from jaxcl.errors import UserError
from jaxcl.run.missing import say_missing_rows


class Rounds:
    """The rows of the file.

    Attributes:
      count: number of rows.
    """

    def __init__(self, path: Path) -> None:
        """Reads nothing yet; see `cut`.

        Args:
          path: the file.
        """
        self._path = path
        self.count = 0

    def cut(self, count: int) -> None:
        """Removes the rows that were written after the first ones; prints a line if there are fewer.

        Args:
          count: number of rows that remain.
        """
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.is_file() else []
        self.count = min(count, len(lines))
        say_missing_rows(self._path, self.count, count, "rows")
        if not lines:
            return
        with replacing(self._path) as temporary:
            temporary.write_bytes(b"".join(lines[:count]))

    def note(self, kind: str, **row: Any) -> None:
        """Adds a row.

        Args:
          kind: `round` or `shared`.
          row: its values by name.

        Raises:
          UserError: the file cannot be written, or is a link.
        """
        with open_end(self._path) as file:
            try:
                file.write((json.dumps({"kind": kind, **row}) + "\n").encode())
            except OSError as error:
                raise UserError(f"{self._path}: cannot be written: {reason(error)}") from error
        self.count += 1


__all__ = ["Rounds"]
