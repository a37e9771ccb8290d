"""Data sets of other libraries: TensorFlow Datasets (without TensorFlow) and Hugging Face datasets."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxcl.errors import UserError

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


class _Named:
    """Rows with class names instead of class numbers; a negative number (no label) stays a number."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], field: str, labels: tuple[str, ...]) -> None:
        self._rows, self._field, self._labels = rows, field, labels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Mapping[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = dict(self._rows[index])
        number = row[self._field]
        if not isinstance(number, int | np.integer):  # null, for example; refused with the row's number
            return row
        return row | {self._field: self._labels[number] if 0 <= number < len(self._labels) else str(number)}


def _named(splits: Splits, field: str, labels: tuple[str, ...]) -> tuple[Splits, tuple[str, ...]]:
    if not labels:
        return splits, ()
    return {split: _Named(rows, field, labels) for split, rows in splits.items()}, labels  # type: ignore[misc]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
