"""From host batches to global batches on the devices."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxcl.data.rows import HostBatch
from jaxcl.errors import UserError
from jaxcl.models.batch import Batch
from jaxcl.models.images import Images

_INTEGERS = frozenset(HostBatch.__annotations__) - {"weights", "pixels", "teacher", "origin", "memory"}


class RowIterator(Protocol):
    """Source of a `Feed`: an iterator, endless or not, whose position can be saved and restored."""

    def __next__(self) -> HostBatch:
        """This process's rows of the next batch."""
        ...

    def get_state(self) -> Any:
        """The position, JSON-serialisable."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes to a position that `get_state` returned."""
        ...


def place_batch(rows: HostBatch, sharding: NamedSharding) -> Batch:
    """A batch over all devices from this process's rows.

    Args:
      rows: numpy arrays by `Batch` field name, whose leading axis is the process's share of the batch; they must not be
        changed afterwards. `predict` and fields with a default in `Batch` may be absent or `None`.
      sharding: `Layout.batch`.

    Returns:
      A `Batch` of global arrays: int32, except `weights` (float32), pixels and teacher records (unchanged).

    Raises:
      ValueError: a field is unknown or missing.
    """
    fields: dict[str, Any] = {name: value for name, value in rows.items() if value is not None}
    if "memory" in fields:
        fields["memory"] = place_batch(fields["memory"], sharding)
    for name in _INTEGERS & fields.keys():
        fields[name] = np.asarray(fields[name], np.int32)
    if "weights" in fields:
        fields["weights"] = np.asarray(fields["weights"], np.float32)
    if "origin" in fields:
        fields["origin"] = str(fields["origin"])
    if "pixels" in fields:
        fields["images"] = Images(fields.pop("pixels"), fields.pop("image_index"))
    try:
        batch = Batch(**{"predict": None, **fields})
    except TypeError as error:
        raise ValueError(f"rows: expected the fields of Batch, got {sorted(rows)}: {error}") from error
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)


class Feed:
    """Batches on the devices, prefetched; `get_state` is the position after the last batch *consumed*.

    Transfers are asynchronous: the devices compute while `prefetch` batches are sent. No thread is involved.
    """

    def __init__(self, rows: RowIterator, sharding: NamedSharding, *, prefetch: int) -> None:
        """Starts at the iterator's position.

        Args:
          rows: iterator over this process's rows of each batch.
          sharding: `Layout.batch`.
          prefetch: number of batches sent ahead, 0 or more.
        """
        self._rows = rows
        self._sharding = sharding
        self._prefetch = prefetch
        self._queue: collections.deque[tuple[Batch, Any]] = collections.deque()
        self._state = copy.deepcopy(rows.get_state())
        self._ended = False

    def __iter__(self) -> Iterator[Batch]:
        """Itself."""
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          StopIteration: the iterator has ended.
        """
        while not self._ended and len(self._queue) <= self._prefetch:
            try:
                rows = next(self._rows)
            except StopIteration:
                self._ended = True
                break
            self._queue.append((place_batch(rows, self._sharding), copy.deepcopy(self._rows.get_state())))
        if not self._queue:
            raise StopIteration
        batch, self._state = self._queue.popleft()
        return batch

    def get_state(self) -> Any:
        """The position after the last batch returned; prefetched batches do not count."""
        return copy.deepcopy(self._state)

    def set_state(self, state: Any) -> None:
        """Goes to a position that `get_state` returned and drops prefetched batches.

        Raises:
          UserError: it is no position in these rows.
        """
        self._queue.clear()
        self._ended = False
        try:
            if not _alike(state, self._rows.get_state()):
                raise TypeError
            self._rows.set_state(copy.deepcopy(state))
        except (LookupError, TypeError, ValueError, AttributeError):
            raise UserError(
                "the checkpoint's position in the data cannot be used: it has another form; go on with the version of "
                "jaxcl that wrote it"
            ) from None
        self._state = copy.deepcopy(state)


def _alike(state: Any, own: Any) -> bool:
    """Whether a position has the names and kinds of values of another one."""
    if isinstance(own, dict):
        return isinstance(state, dict) and {name: type(value) for name, value in state.items()} == {
            name: type(value) for name, value in own.items()
        }
    return type(state) is type(own)
