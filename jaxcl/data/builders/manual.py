"""Files that a user puts into a folder by hand: possible layouts, and what is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxcl.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """A possible layout of a data set's files in their folder.

    Attributes:
      files: relative paths by split; each file may also be gzip, with `.gz` appended to its name.
      what: what a file contains, for messages.
      optional: splits that may be absent.
    """

    files: Mapping[str, Sequence[str]]
    what: str
    optional: frozenset[str] = frozenset()

    def found(self, folder: Path) -> dict[str, list[Path]]:
        """The existing files, by split."""
        paths = {split: [_existing(folder, name) for name in names] for split, names in self.files.items()}
        return {split: [path for path in found if path] for split, found in paths.items() if any(found)}

    def missing(self, folder: Path) -> list[str]:
        """One line per missing file: its path relative to `folder`, and what it contains."""
        present = self.found(folder)
        return [
            f"{name}: {self.what}"
            for split, names in self.files.items()
            for name in names
            if not _existing(folder, name) and (split not in self.optional or split in present)
        ]


class MissingFiles(UserError):
    """Files are missing: a first line that says where, then one line per file.

    >>> print(MissingFiles("tfds:trace/fomc", Path("data"), ["FOMC/train.json: a JSON list"]))
    tfds:trace/fomc: 1 file is missing in data (docs/data.md says where to get it):
      FOMC/train.json: a JSON list
    """

    def __init__(self, name: str, folder: Path, missing: Sequence[str]) -> None:
        count, it = ("1 file is", "it") if len(missing) == 1 else (f"{len(missing)} files are", "them")
        first = f"{name}: {count} missing in {folder} (docs/data.md says where to get {it}):"
        super().__init__(first)
        self.args = ("\n  ".join([first, *missing]),)


def choose(layouts: Sequence[Layout], folder: Path) -> Layout:
    """The layout with the most files in `folder`; the first one if there are none."""
    return max(layouts, key=lambda layout: sum(map(len, layout.found(folder).values())))


def _existing(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
