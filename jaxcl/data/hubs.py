"""Data sets of other libraries: TensorFlow Datasets (without TensorFlow) and Hugging Face datasets."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcl.data.formats.base import ListRecords, Numbering, Part, Records, Where
from jaxcl.errors import UserError

_PART_ROWS = 2**16
Splits = dict[str, Sequence[Mapping[str, Any]]]


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
            module = importlib.import_module(f"{name}.{name.rpartition('.')[2]}_dataset_builder")
            builder = module.Builder(config=config or None, **options)
        else:
            importlib.import_module("jaxcl.data.builders")  # registers them by name
            builder = tfds.builder(rest, **options)
        with contextlib.redirect_stdout(io.StringIO()):  # hides its progress bars
            builder.download_and_prepare()
        splits = {split: builder.as_data_source(split) for split in builder.info.splits}
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
    return _named(splits, label_field, tuple(getattr(feature, "names", None) or ()))


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
    splits: Splits = {str(split): rows for split, rows in found.items()}
    features = next(iter(found.values())).features if splits else {}
    return _named(splits, label_field, tuple(getattr(features.get(label_field), "names", None) or ()))


class HubRecords:
    """Records of a memory-mapped data set, a range of rows at a time."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], where: str, key: str) -> None:
        """Describes the records.

        Args:
          rows: the data set.
          where: what it is called in messages.
          key: changes if its content may have changed.
        """
        self.where = where
        self._rows = rows
        self._key = key

    def key(self) -> str:
        """See `Records`."""
        return self._key

    def parts(self) -> list[Part]:
        """See `Records`."""
        count = len(self._rows)
        return [Part(self.where, start, min(start + _PART_ROWS, count)) for start in range(0, count, _PART_ROWS)]

    def read(self, part: Part) -> Iterator[tuple[Where, Mapping[str, Any]]]:
        """See `Records`."""
        numbering = Numbering(self.where, "row", lambda: part.start)
        stop = len(self._rows) if part.stop is None else part.stop
        for index in range(part.start, stop):
            yield Where((numbering, index - part.start + 1)), self._rows[index]


def hub_records(rows: Sequence[Mapping[str, Any]], where: str) -> Records:
    """The records of a split: streamed if the library says by what its content can be recognised, else in memory."""
    inner = rows.rows if isinstance(rows, _Named) else rows
    names = rows.labels if isinstance(rows, _Named) else ()
    fingerprint = getattr(inner, "_fingerprint", None)
    if not isinstance(fingerprint, str):
        return ListRecords(rows, where)
    return HubRecords(rows, where, json.dumps([fingerprint, len(rows), names]))


class _Named:
    """Rows with class names instead of class numbers; a negative number (no label) stays a number."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], field: str, labels: tuple[str, ...]) -> None:
        self.rows, self.labels, self._field = rows, labels, field

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = dict(self.rows[index])
        number = row[self._field]
        if not isinstance(number, int | np.integer):  # null, for example; refused with the row's number
            return row
        return row | {self._field: self.labels[number] if 0 <= number < len(self.labels) else str(number)}


def _named(splits: Splits, field: str, labels: tuple[str, ...]) -> tuple[Splits, tuple[str, ...]]:
    if not labels:
        return splits, ()
    return {split: _Named(rows, field, labels) for split, rows in splits.items()}, labels  # type: ignore[misc]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
