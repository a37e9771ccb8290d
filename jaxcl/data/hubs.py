"""Data sets of other libraries: TensorFlow Datasets (without TensorFlow) and Hugging Face datasets."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcl.data.formats.base import ListRecords, Numbering, Part, Records, Where
from jaxcl.data.formats.fingerprint import files_key
from jaxcl.errors import UserError

_PART_ROWS, _BATCH_ROWS = 2**16, 2**10
Splits = dict[str, "HubRows"]


def read_tfds(rest: str, data_dir: str | None, label_field: str) -> tuple[Splits, tuple[str, ...]]:
    """Reads all splits of a TensorFlow Datasets data set as ArrayRecord files, which are prepared at first use.

    Args:
      rest: `name` or `name/config` of a data set of `jaxcl.data.builders` or of TFDS. A name with dots is the import
        path of a package with a builder of your own in `NAME_dataset_builder.py`.
      data_dir: where prepared data is kept; none: TFDS's default folder.
      label_field: the field whose class numbers are replaced by class names.

    Returns:
      Records by split, and the class names if the field has any.

    Raises:
      UserError: the library or the data set is missing, or cannot be prepared.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"source tfds:{rest} needs the package tensorflow-datasets: {error}") from error
    name, _, config = rest.partition("/")
    options: dict[str, Any] = {"data_dir": data_dir, "file_format": "array_record"}
    try:
        if "." in name:
            module = _own_module(builder_module(name))
            builder = module.Builder(config=config or None, **options)
        else:
            importlib.import_module("jaxcl.data.builders")  # registers them by name
            builder = tfds.builder(rest, **options)
        with contextlib.redirect_stdout(io.StringIO()):  # hides its progress bars
            builder.download_and_prepare()
        splits = {split: builder.as_data_source(split) for split in builder.info.splits}
        keys = {split: files_key(sorted(map(str, found.filepaths))) for split, found in builder.info.splits.items()}
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "tensorflow":
            raise UserError(f"source tfds:{rest}: this data set's builder needs TensorFlow itself") from error
        raise UserError(f"source tfds:{rest}: {error}") from error
    except Exception as error:  # downloads and builders raise many types
        raise UserError(f"source tfds:{rest}: {_first_line(error)}") from error
    features = builder.info.features
    feature = features[label_field] if label_field in getattr(features, "keys", list)() else None
    labels = tuple(getattr(feature, "names", None) or ())
    return {split: HubRows(rows, keys[split], label_field, labels) for split, rows in splits.items()}, labels


def builder_module(name: str) -> str:
    """The module of a builder that is not registered, by its name with dots.

    >>> builder_module("mine.reviews")
    'mine.reviews.reviews_dataset_builder'
    """
    return f"{name}.{name.rpartition('.')[2]}_dataset_builder"


def _own_module(name: str) -> Any:
    """The module of a user's own builder; it may be in the current folder."""
    here = os.getcwd()
    if name not in sys.modules and here not in sys.path:
        sys.path.append(here)
    return importlib.import_module(name)


def read_hf(rest: str, data_dir: str | None, label_field: str) -> tuple[Splits, tuple[str, ...]]:
    """Reads all splits of a Hugging Face data set.

    Args:
      rest: `owner/name` or `name`, either with an optional `:config` suffix; or a local folder.
      data_dir: where downloads are kept; none: the library's default folder.
      label_field: see `read_tfds`.

    Returns:
      See `read_tfds`.

    Raises:
      UserError: the library or the data set is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"source hf:{rest} needs the package datasets: pip install 'jaxcl[hf]'") from error
    name, _, config = rest.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, cache_dir=data_dir)
    except Exception as error:  # downloads and loaders raise many types
        raise UserError(f"source hf:{rest}: {_first_line(error)}") from error
    features = next(iter(found.values())).features if found else {}
    labels = tuple(getattr(features.get(label_field), "names", None) or ())
    splits = {
        str(split): HubRows(rows, getattr(rows, "_fingerprint", None), label_field, labels)
        for split, rows in found.items()
    }
    return splits, labels


class HubRows:
    """Rows of a split, with class names instead of class numbers; a negative number (no label) stays a number.

    Attributes:
      key: changes if the rows may have changed; `None`: unknown.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], key: str | None, label_field: str, labels: tuple[str, ...]
    ) -> None:
        """Wraps rows of a library.

        Args:
          rows: the rows.
          key: see above.
          label_field: the field whose numbers are replaced.
          labels: names of the classes, in the order of their numbers; empty: nothing is replaced.
        """
        self.key = None if key is None else json.dumps([key, len(rows), label_field, labels])
        self._rows, self._field, self._labels = rows, label_field, labels

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Iterator[Mapping[str, Any]]:
        """The rows of a range, in order."""
        several = getattr(self._rows, "__getitems__", None)
        for first in range(start, stop, _BATCH_ROWS):
            numbers = range(first, min(first + _BATCH_ROWS, stop))
            yield from map(self._named, several(list(numbers)) if several else (self._rows[n] for n in numbers))

    def _named(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self._labels:
            return row
        number = row[self._field]
        if not isinstance(number, int | np.integer):  # null, for example; refused with the row's number
            return row
        return dict(row) | {self._field: self._labels[number] if 0 <= number < len(self._labels) else str(number)}


class HubRecords:
    """Records of a split that a library keeps on disk, a range of rows at a time."""

    def __init__(self, rows: HubRows, where: str) -> None:
        self.where = where
        self._rows = rows

    def key(self) -> str:
        """See `Records`."""
        if self._rows.key is None:
            raise ValueError(f"{self.where}: its library does not say by what it can be recognised")
        return self._rows.key

    def parts(self) -> list[Part]:
        """See `Records`."""
        count = len(self._rows)
        return [Part(self.where, start, min(start + _PART_ROWS, count)) for start in range(0, count, _PART_ROWS)]

    def read(self, part: Part) -> Iterator[tuple[Where, Mapping[str, Any]]]:
        """See `Records`."""
        numbering = Numbering(self.where, "row", lambda: part.start)
        stop = len(self._rows) if part.stop is None else part.stop
        for number, row in enumerate(self._rows.read(part.start, stop), 1):
            yield Where((numbering, number)), row


def hub_records(rows: HubRows, where: str) -> Records:
    """The records of a split: streamed if the library says by what its content can be recognised, else in memory."""
    return ListRecords(list(rows.read(0, len(rows))), where) if rows.key is None else HubRecords(rows, where)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
