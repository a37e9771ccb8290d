"""From rows in host memory to global batches on the devices."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxcl.data.rows import HostBatch
from jaxcl.models.batch import Batch

_INTEGERS = frozenset(HostBatch.__annotations__) - {"weights", "teacher", "origin", "memory"}


class RowIterator(Protocol):
    """What a feed reads from: endless or not, and able to say where it stands."""

    def __next__(self) -> HostBatch:
        """This process's rows of the next batch: numpy arrays by `Batch` field name, and `kind`."""
        ...

    def get_state(self) -> Any:
        """Position, JSON-able."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes to a position that `get_state` returned."""
        ...


def place_batch(rows: HostBatch, sharding: NamedSharding) -> Batch:
    """Rows of this process to a batch over all devices.

    Args:
      rows: numpy arrays by `Batch` field name, leading axis the process's share of the batch; must not be changed
        afterwards. What has a default in `Batch`, and `predict`, may be absent or `None`; `memory` is rows likewise.
      sharding: `Layout.batch`.

    Returns:
      A `Batch` of global arrays: int32, `weights` float32, teacher records as they are.

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
    try:
        batch = Batch(**{"predict": None, **fields})
    except TypeError as error:
        raise ValueError(f"rows: expected the fields of Batch, got {sorted(rows)}: {error}") from error
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)


class Feed:
    """Batches on the devices, a few ahead of the step that needs them; knows where the *consumed* data ends.

    Sending is asynchronous, so `prefetch` batches travel while the devices compute; no thread is involved.
    """

    def __init__(self, rows: RowIterator, sharding: NamedSharding, *, prefetch: int) -> None:
        """Starts at the iterator's position.

        Args:
          rows: the process's rows.
          sharding: `Layout.batch`.
          prefetch: batches sent ahead, 0 or more.
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
        """Position after the last batch that was handed out, whatever was prefetched since."""
        return copy.deepcopy(self._state)

    def set_state(self, state: Any) -> None:
        """Goes to a position that `get_state` returned and drops what was prefetched."""
        self._queue.clear()
        self._ended = False
        self._rows.set_state(copy.deepcopy(state))
        self._state = copy.deepcopy(state)
