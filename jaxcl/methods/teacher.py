"""What SEEKR stores beside an example, on the host: without padding on disk, in fixed shapes in a batch. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

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


def collate_records(records: Sequence[Mapping[str, np.ndarray]], *, queries: int, length: int, predict: int) -> Record:
    """Trimmed records as arrays of a given shape.

    Args:
      records: as `trim_record` returned them; all zeros for rows that only fill a batch, whose tokens are padding.
      queries: query positions that there is room for.
      length: tokens of a row.
      predict: scored positions of a row.

    Returns:
      `heads [batch, selected, 2]` (layer, head) and `queries [batch, queries]`, -1 for none; `rows [batch, selected,
      queries, length]`; outputs `[batch, predict, ...]`.
    """
    size, first = len(records), records[0]
    selected = len(first["heads"])
    outputs = sorted(first.keys() - _ATTENTION)
    batch = {
        "heads": np.full((size, selected, 2), -1, np.int32),
        "queries": np.full((size, queries), -1, np.int32),
        "rows": np.zeros((size, selected, queries, length), first["rows"].dtype),
        **{name: np.zeros((size, predict, *first[name].shape[1:]), first[name].dtype) for name in outputs},
    }
    for row, record in enumerate(records):
        if not record["rows"].any():  # a filler row
            continue
        real_queries, real_length = record["rows"].shape[1:]
        batch["heads"][row] = record["heads"]
        batch["queries"][row, :real_queries] = record["queries"]
        batch["rows"][row, :, :real_queries, :real_length] = record["rows"]
        for name in outputs:
            batch[name][row, : len(record[name])] = record[name]
    return batch
