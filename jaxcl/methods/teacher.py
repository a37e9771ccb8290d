"""What SEEKR stores beside an example, on the host: without padding on disk, in fixed shapes in a batch. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from jaxcl.methods.base import Record

_ATTENTION = frozenset({"heads", "queries", "rows", "length", "predicted"})


def trim_record(record: Record) -> Record:
    """A row of `Seekr.signals` without its padding.

    Returns:
      `heads [selected, 2]`, `queries [real queries]`, `rows [selected, real queries, real length]`, and the outputs
      at the real scored positions. `length` and `predicted` follow from these shapes and are left out.
    """
    length, predicted = int(record["length"]), int(record["predicted"])
    real = record["queries"] >= 0
    return {
        "heads": record["heads"],
        "queries": record["queries"][real],
        "rows": record["rows"][:, real, :length],
        **{name: record[name][:predicted] for name in sorted(record.keys() - _ATTENTION)},
    }


def slots_needed(heads: Int[np.ndarray, "tasks selected 2"]) -> int:
    """The largest number of heads that any task selected in one layer; (layer, head) pairs are -1 for tasks to come."""
    learned = [task[:, 0] for task in heads if task[0, 0] >= 0]
    return max((int(np.bincount(layers).max()) for layers in learned), default=1)


def collate_records(
    records: Sequence[Mapping[str, np.ndarray]], *, layers: int, slots: int, queries: int, length: int, predict: int
) -> Record:
    """Trimmed records as arrays of a given shape.

    Args:
      records: as `trim_record` returned them; all zeros for rows that only fill a batch, whose tokens are padding.
      layers: number of layers.
      slots: heads of a layer that there is room for.
      queries: query positions that there is room for.
      length: tokens of a row.
      predict: scored positions of a row.

    Returns:
      `heads [batch, layers, slots]` and `queries [batch, queries]`, -1 for none; `rows [batch, layers, slots,
      queries, length]`; outputs `[batch, predict, ...]`.
    """
    size, first = len(records), records[0]
    outputs = sorted(first.keys() - _ATTENTION)
    batch = {
        "heads": np.full((size, layers, slots), -1, np.int32),
        "queries": np.full((size, queries), -1, np.int32),
        "rows": np.zeros((size, layers, slots, queries, length), first["rows"].dtype),
        **{name: np.zeros((size, predict, *first[name].shape[1:]), first[name].dtype) for name in outputs},
    }
    for row, record in enumerate(records):
        real_queries, real_length = record["rows"].shape[1:]
        batch["queries"][row, :real_queries] = record["queries"]
        filled = np.zeros(layers, int)
        for (layer, head), rows in zip(record["heads"], record["rows"], strict=True):
            slot = filled[layer]
            if slot < slots:  # only a filler row, all of whose heads are (0, 0), has more
                batch["heads"][row, layer, slot] = head
                batch["rows"][row, layer, slot, :real_queries, :real_length] = rows
                filled[layer] += 1
        for name in outputs:
            batch[name][row, : len(record[name])] = record[name]
    return batch
