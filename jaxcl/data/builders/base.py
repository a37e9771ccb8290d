"""The builders' base class: rows are read from a folder that the user filled, and keep their order."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxcl.data.builders.manual import Layout, MissingFiles, choose
from jaxcl.errors import UserError

Row = Mapping[str, str]


class ManualBuilder(tfds.core.GeneratorBasedBuilder):
    """A data set whose files are checked before anything is written and whose rows keep their order."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "docs/data.md of jaxcl says where to get the files and where to put them."

    @property
    def published(self) -> Mapping[str, int]:
        """Number of rows by split in the benchmark's paper; empty if it states none."""
        return {}

    @property
    @abc.abstractmethod
    def layouts(self) -> Sequence[Layout]:
        """The possible layouts of this configuration's files in the manual folder."""

    @abc.abstractmethod
    def read(self, files: Mapping[str, Sequence[Path]]) -> dict[str, list[Row]]:
        """Rows by split (`train`, `validation`, `test`), from the files found by split.

        Raises:
          UserError: a file has the wrong format.
        """

    @property
    def prepared(self) -> bool:
        """Whether the ArrayRecord files exist."""
        return bool(self.data_path.exists())

    def missing(self, folder: Path) -> list[str]:
        """One line for each file that `folder` lacks; see `Layout.missing`."""
        return choose(self.layouts, folder).missing(folder)

    def download_and_prepare(
        self, *, download_dir: Any = None, download_config: Any = None, file_format: Any = None, **options: Any
    ) -> None:
        """Reads the manual folder and writes the record files, unless they exist.

        Args:
          download_dir: see TFDS.
          download_config: its `manual_dir` is the folder; default: TFDS's own, `downloads/manual` in `data_dir`.
          file_format: see TFDS.
          **options: see TFDS.

        Raises:
          MissingFiles: files are missing in the folder; nothing is written.
          UserError: a file has the wrong format.
        """
        given = download_config.manual_dir if download_config else None
        folder = Path(given or Path(download_dir or self.data_dir_root / "downloads") / "manual").expanduser()
        if not self.prepared and (missing := self.missing(folder)):
            raise MissingFiles(f"tfds:{self.name}/{self.builder_config.name}", folder, missing)
        super().download_and_prepare(
            download_dir=download_dir, download_config=download_config, file_format=file_format, **options
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Row]]]:
        folder = Path(dl_manager.manual_dir)
        files = choose(self.layouts, folder).found(folder)
        splits = self.read(files)
        for split, rows in splits.items():
            if not rows:
                raise UserError(f"tfds:{self.name}/{self.builder_config.name}: no {split} rows in {folder}")
        return {split: self._generate_examples(rows) for split, rows in splits.items()}

    def _generate_examples(self, rows: Sequence[Row]) -> Iterator[tuple[int, Row]]:
        yield from enumerate(rows)

    def described(self, description: str, homepage: str, features: Mapping[str, Any]) -> Any:
        """The data set's information; `_info` returns it."""
        return tfds.core.DatasetInfo(
            builder=self,
            description=description,
            homepage=homepage,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )
