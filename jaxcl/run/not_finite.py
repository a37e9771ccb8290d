"""What a run leaves when it stops because its numbers are not finite: which steps, and which rows they read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxcl.data.files import write_json
from jaxcl.data.pipeline import Stream
from jaxcl.data.rows import HostBatch
from jaxcl.run.rewinding import order_seed
from jaxcl.training.watch import NotFinite, Watch

#: Rows that are named of an order at most, and of those that are in all orders.
MOST_ROWS = 100
_GENERAL = -1


def write_not_finite(
    path: Path, error: NotFinite, watch: Watch, stream: Stream, *, task: str, names: list[str], seed: int
) -> None:
    """Writes what the report of a stopped run shows. Rows are numbered from 0 in their task's training data.

    A task that went back to a checkpoint has read its rows in several orders. Rows that are among the last steps of
    each are suspects; if there are none, it is hardly the data.

    Args:
      path: the file.
      error: why the run stops.
      watch: of the task.
      stream: its batches.
      task: its name.
      names: names of all tasks.
      seed: of the first order of its rows.
    """
    stops = [*(left for _, left in watch.left), error.step]
    orders, common = [], None
    for number, last in enumerate(stops):
        first = max(1, last - watch.limit + 1)
        found = sorted(set(_rows(stream, range(first, last + 1), order_seed(seed, number))))
        common = set(found) if common is None else common & set(found)
        orders.append({"first": first, "last": last, **_named(found, names)})
    content = {
        "message": str(error),
        "task": task,
        "skipped": watch.skipped,
        "orders": orders,
        "in_all_orders": _named(sorted(common or ()), names) if len(orders) > 1 else None,
    }
    write_json(path, content)


def _rows(stream: Stream, steps: range, seed: int) -> Iterator[tuple[int, int]]:
    """Task and number of each example of the steps, which are counted from 1."""
    for step in steps:
        batch: HostBatch | None = stream.batch_at(step - 1, seed=seed, process_index=0, process_count=1)
        while batch is not None:
            general = batch.get("origin") == "general"
            for task, example in zip(batch["task"].tolist(), batch["example"].tolist(), strict=True):
                if example >= 0:  # else it only fills the batch
                    yield _GENERAL if general else task, example
            batch = batch.get("memory")


def _named(rows: list[tuple[int, int]], names: list[str]) -> dict[str, Any]:
    """The first rows by the names of their tasks, and how many there are."""
    by_task: dict[str, list[int]] = {}
    for task, example in rows[:MOST_ROWS]:
        by_task.setdefault("general rows" if task == _GENERAL else names[task], []).append(example)
    return {"count": len(rows), "rows": by_task}
