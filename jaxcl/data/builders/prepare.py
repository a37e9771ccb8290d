"""`jaxcl prepare`: from a folder filled by hand to ArrayRecord files."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from jaxcl.data.builders import das, instructions
from jaxcl.data.builders.base import ManualBuilder
from jaxcl.data.builders.manual import MissingFiles
from jaxcl.errors import UserError

_DAS = (das.DasRestaurant, das.DasPhone, das.DasCamera, das.DasAcl, das.DasAi, das.DasPubmed)
BUILDERS: dict[str, type[ManualBuilder]] = {
    builder.name: builder for builder in (*_DAS, instructions.Trace, instructions.Superni)
}
#: Names of groups of data sets.
GROUPS: dict[str, tuple[str, ...]] = {"das": tuple(builder.name for builder in _DAS)}


class Prepared(NamedTuple):
    """A prepared data set.

    Attributes:
      name: the name that follows `tfds:` in a source.
      rows: number of rows by split.
      published: number of rows by split in the benchmark's paper, if stated.
      folder: folder of the records.
    """

    name: str
    rows: dict[str, int]
    published: dict[str, int]
    folder: Path

    def line(self) -> str:
        """Name, sizes, and the published sizes if they differ."""
        sizes = ", ".join(f"{split} {count}" for split, count in self.rows.items())
        other = {split: count for split, count in self.published.items() if self.rows.get(split) != count}
        paper = ", ".join(f"{split} {count}" for split, count in other.items())
        return f"tfds:{self.name}: {sizes}{f' (published: {paper})' if other else ''} in {self.folder}"


def prepare(names: Sequence[str], manual_dir: Path, data_dir: Path | None = None) -> Iterator[Prepared]:
    """Prepares data sets one by one. All files are checked before the first record is written.

    Args:
      names: `builder` for all its configurations, `builder/config`, or a name from `GROUPS`.
      manual_dir: the folder that was filled by hand.
      data_dir: where the records go; none: TFDS's default folder.

    Raises:
      UserError: no such data set, or a file has the wrong format.
      MissingFiles: files are missing; nothing is written.
    """
    builders = [
        BUILDERS[name](config=config, data_dir=data_dir, file_format="array_record")
        for name, config in (pair for given in names for pair in expand(given))
    ]
    missing = [line for builder in builders if not builder.prepared for line in builder.missing(manual_dir)]
    if missing:
        raise MissingFiles(" ".join(names), manual_dir, list(dict.fromkeys(missing)))
    for builder in builders:
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bars also go to stderr
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
        rows = {name: split.num_examples for name, split in builder.info.splits.items()}
        name = f"{builder.name}/{builder.builder_config.name}"
        yield Prepared(name, rows, dict(builder.published), Path(builder.data_path))


def expand(given: str) -> list[tuple[str, str]]:
    """Builder and configuration of every data set that a name refers to.

    >>> expand("das_acl")
    [('das_acl', 'domain'), ('das_acl', 'end_task'), ('das_acl', 'end_task_original')]

    Raises:
      UserError: there is no such data set; exit code 2.
    """
    name, _, config = given.partition("/")
    chosen = GROUPS.get(name, (name,))
    if not all(one in BUILDERS for one in chosen):
        raise UserError(f"no data set {given!r}; allowed: {', '.join([*GROUPS, *BUILDERS])}", exit_code=2)
    found = []
    for one in chosen:
        configs = [known.name for known in BUILDERS[one].BUILDER_CONFIGS]
        if config and config not in configs:
            raise UserError(f"{one} has no {config!r}; allowed: {', '.join(configs)}", exit_code=2)
        found += [(one, known) for known in configs if config in ("", known)]
    return found
