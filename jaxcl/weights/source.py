"""The tensors of a checkpoint, read in parts: safetensors in one or several files."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

# numpy has no bfloat16; safetensors can return it if this is imported.
import ml_dtypes  # noqa: F401
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxcl.errors import UserError
from jaxcl.weights.axes import Index

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PART = 2**24  # numbers of a tensor that are compared at a time
_FLOATS = ("F64", "F32", "F16", "BF16")


class Source(Protocol):
    """Named tensors on disk, read on request."""

    @property
    def where(self) -> str:
        """The file or folder, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """Part of a tensor, with its dtype in the file or in float32."""
        ...

    def __enter__(self) -> Source: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: the file cannot be read or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits
        raise UserError(f"{path}: not usable JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


class Safetensors:
    """The tensors of `model.safetensors`, of a checkpoint in several files, or of one `.safetensors` file."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._slices: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        try:
            for file, names in _files(path):
                self._open(file, names)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, path: Path, names: set[str] | None) -> None:
        try:
            file = self._stack.enter_context(safe_open(path, framework="np"))
        except FileNotFoundError:
            raise UserError(f"{path} is missing, although {path.parent / INDEX_FILE} names it") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        except SafetensorError as error:
            raise UserError(f"{path} is not a complete safetensors file: {error}") from None
        held = set(file.keys())
        if names is not None and (lost := names - held):
            raise UserError(f"{path} does not hold the tensor {min(lost)}, although {INDEX_FILE} says so")
        for name in held if names is None else names:
            part = file.get_slice(name)
            self._slices[name] = part
            self.shapes[name] = tuple(part.get_shape())

    def read(self, name: str, index: Index) -> np.ndarray:
        """Part of a tensor, with its dtype in the file.

        Raises:
          UserError: the tensor does not hold floating-point numbers.
        """
        part = self._slices[name]
        if part.get_dtype() not in _FLOATS:
            raise UserError(
                f"{self.where}: {name} holds {part.get_dtype()} numbers; allowed are {', '.join(_FLOATS)} "
                "(quantised checkpoints are read from GGUF only)"
            )
        return part[index]

    def __enter__(self) -> Safetensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._slices.clear()
        self._stack.close()


def same_values(source: Source, one: str, other: str) -> bool:
    """Whether two tensors of a checkpoint hold the same values; read in parts."""
    shape = source.shapes[one]
    if source.shapes[other] != shape:
        return False
    step = max(1, _PART // max(1, math.prod(shape[1:])))
    rest = tuple(slice(0, size) for size in shape[1:])
    parts = ((slice(start, min(start + step, shape[0])), *rest) for start in range(0, shape[0], step))
    return all(np.array_equal(source.read(one, part), source.read(other, part), equal_nan=True) for part in parts)


def _files(path: Path) -> list[tuple[Path, set[str] | None]]:
    """The files of a checkpoint, and which tensors to take from each; `None`: all."""
    if path.is_file():
        return [(path, None)]
    if (path / SINGLE_FILE).is_file():
        return [(path / SINGLE_FILE, None)]
    index = path / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: expected an object weight_map of tensor names to file names")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # Half of a surrogate pair is in no file's name.
        if not (isinstance(file, str) and file and Path(file).name == file == file.encode("utf-8", "ignore").decode()):
            raise UserError(
                f"{index}: weight_map: {name} points to {file!r}; expected the name of a file in the same folder"
            )
        files.setdefault(file, set()).add(name)
    return [(path / file, names) for file, names in sorted(files.items())]
