"""What a method stores with remembered rows: without padding on disk, in fixed shapes in a batch.

`Method.stored` declares which axes are padded; removing and adding the padding follow from it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxcl.data.plan import Shape
from jaxcl.methods.base import Method, Params, State, Stored
from jaxcl.models.batch import Batch

Record = dict[str, np.ndarray]
Shapes = dict[str, jax.ShapeDtypeStruct]


def trim(record: Mapping[str, np.ndarray], stored: Mapping[str, Stored], *, length: int, predict: int) -> Record:
    """A row's signals without their padding.

    Args:
      record: what `Method.signals` returned for the row.
      stored: how each array is stored.
      length: number of tokens of the row.
      predict: number of its scored positions.

    Examples:
      >>> record = {"places": np.array([0, 4, -1]), "values": np.arange(12).reshape(3, 4)}
      >>> stored = {"places": Stored(("places",), fill=-1), "values": Stored(("places", "length"))}
      >>> {name: value.tolist() for name, value in trim(record, stored, length=2, predict=0).items()}
      {'places': [0, 4], 'values': [[0, 1], [4, 5]]}
    """
    sizes = {"length": length, "predict": predict}
    for name, (axes, fill) in stored.items():
        if axes == (name,):
            sizes[name] = int(np.sum(record[name] != fill))
    return {name: value[_inner(_of(stored, name).axes, sizes)] for name, value in record.items()}


def collate(records: Sequence[Mapping[str, np.ndarray] | None], stored: Mapping[str, Stored], shapes: Shapes) -> Record:
    """Trimmed records, padded to the arrays of a batch.

    Args:
      records: record of each row; `None` for filler rows.
      stored: how each array is stored.
      shapes: shape of each array, with a leading `batch` axis of any size; see `stored_shapes`.
    """
    batch = {
        name: np.full((len(records), *shape.shape[1:]), _of(stored, name).fill, shape.dtype)
        for name, shape in shapes.items()
    }
    for row, record in enumerate(records):
        for name, value in (record or {}).items():
            inner: Any = (row, *(slice(size) for size in value.shape))
            batch[name][inner] = value
    return batch


def stored_shapes(method: Method[Any], params: Params, state: State, rows: int, shape: Shape) -> Shapes:
    """Shapes of the `teacher` field of a batch of remembered rows; empty if the method stores nothing.

    Args:
      method: the method.
      params: the params, or their shapes.
      state: the method's state, or its shapes.
      rows: number of rows.
      shape: shape of the rows.

    Raises:
      ValueError: `Method.stored` names an array that `Method.signals` does not return.
    """
    batch = Batch.abstract(rows, shape.length, shape.predict, origin="memory")
    key = jax.eval_shape(lambda: jax.random.key(0))
    signals = jax.eval_shape(method.signals, params, state, batch, key) or {}
    if signals and (missing := sorted(method.stored.keys() - signals.keys())):
        raise ValueError(f"{type(method).__name__}.stored names {', '.join(missing)}, which signals does not return")
    return signals


class Collate:
    """`collate` for a method. Shapes depend on the batch's shape only, so that all processes agree on them."""

    def __init__(self, method: Method[Any], params: Params, state: State) -> None:
        self._stored = method.stored
        self._shapes = functools.cache(lambda shape: stored_shapes(method, params, state, 1, shape))

    def __call__(self, records: Sequence[Mapping[str, np.ndarray] | None], shape: Shape) -> Record:
        """The records of a batch's rows, as arrays with a leading batch axis."""
        return collate(records, self._stored, self._shapes(shape))


def _of(stored: Mapping[str, Stored], name: str) -> Stored:
    """How an array is stored; one that is not named, whole."""
    return stored.get(name, Stored())


def _inner(axes: tuple[str | None, ...], sizes: Mapping[str, int]) -> Any:
    return tuple(slice(None if axis is None else sizes[axis]) for axis in axes)
