"""The metadata and tensors of a GGUF file; tensors are dequantised in parts."""

from __future__ import annotations

import functools
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import gguf
import numpy as np

from jaxcl.errors import UserError
from jaxcl.gguf_header import check_header
from jaxcl.weights.axes import Index

# Longer lists in the metadata belong to the tokenizer.
_LONGEST = 1024


class _Contents(NamedTuple):
    """The content of a file: its metadata without long lists, and its tensors, which stay on disk."""

    metadata: dict[str, Any]
    tensors: dict[str, Any]


class Gguf:
    """A GGUF file.

    Attributes:
      where: the file, for messages.
      shapes: shape of every tensor, slowest axis first (GGUF itself counts the other way round).
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        try:
            stat = path.stat()
            self._contents = _contents(path, stat.st_mtime_ns, stat.st_size)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        except UserError:
            raise
        except Exception as error:  # the reader has no error type for damaged files
            raise UserError(f"{path} is not a complete GGUF file: {error}") from None
        tensors = self._contents.tensors
        self.shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata; float32 values are rounded to their shortest decimal representation."""
        return self._contents.metadata.get(key, default)

    def read(self, name: str, index: Index) -> np.ndarray:
        """Part of a tensor, float32.

        Raises:
          UserError: the gguf package cannot dequantise the tensor.
        """
        tensor = self._contents.tensors[name]
        # Only the last axis is quantised in blocks; the others are sliced before dequantising.
        rows = tensor.data[index[:-1]] if len(index) > 1 else tensor.data
        try:
            values = gguf.quants.dequantize(rows, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{self.where}: {name} is stored as {tensor.tensor_type.name}, which cannot be read"
            ) from None
        return values[..., index[-1]]

    def __enter__(self) -> Gguf:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Does nothing: tensors are views of the file's memory map."""


@functools.lru_cache(maxsize=2)
def _contents(path: Path, modified: int, size: int) -> _Contents:
    """Cached for the configuration and the tensors: parsing a vocabulary in the metadata takes seconds."""
    check_header(path)
    reader = gguf.GGUFReader(path)
    metadata = {key: _value(field) for key, field in reader.fields.items() if len(field.data) <= _LONGEST}
    return _Contents(metadata, {tensor.name: tensor for tensor in reader.tensors})


def _value(field: Any) -> Any:
    value = field.contents()
    if field.types[-1] == gguf.GGUFValueType.FLOAT32:
        return [_shortest(v) for v in value] if isinstance(value, list) else _shortest(value)
    return value


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))
