"""A batch in portions."""

from __future__ import annotations

import jax

from jaxcl.models.batch import Batch


def micro_batches(batch: Batch, accumulate: int) -> Batch:
    """Splits rows into micro-batches: leaves `[batch, ...]` to `[accumulate, batch / accumulate, ...]`.

    Micro-batch i takes rows i, i + accumulate, ..., so that the rows of a micro-batch lie on all devices and nothing
    moves between them.

    Raises:
      ValueError: the number of rows is no multiple of `accumulate`.
    """
    if batch.size % accumulate:
        raise ValueError(f"batch: expected a multiple of accumulate={accumulate} rows, got {batch.size}")
    return jax.tree.map(
        lambda leaf: leaf.reshape(leaf.shape[0] // accumulate, accumulate, *leaf.shape[1:]).swapaxes(0, 1), batch
    )
