"""Micro-batches."""

from __future__ import annotations

import jax

from jaxcl.models.batch import Batch


def micro_batches(batch: Batch, accumulate: int) -> Batch:
    """Splits rows into micro-batches: leaves `[batch, ...]` to `[accumulate, batch / accumulate, ...]`.

    Micro-batch i takes rows i, i + accumulate, ..., so that every device holds an equal share of each micro-batch
    and nothing moves between devices.

    Raises:
      ValueError: the number of rows is not a multiple of `accumulate`.
    """
    if batch.size % accumulate:
        raise ValueError(f"batch: expected a multiple of accumulate={accumulate} rows, got {batch.size}")
    return jax.tree.map(
        lambda leaf: leaf.reshape(leaf.shape[0] // accumulate, accumulate, *leaf.shape[1:]).swapaxes(0, 1), batch
    )
