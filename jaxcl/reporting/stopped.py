"""The section of a report on why a run stopped: numbers that were not finite, and the rows that they came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxcl.reporting.page import section, table, text
from jaxcl.reporting.run_data import RunData


def stopped_section(run: RunData) -> str:
    """The section; empty if the run did not stop for its numbers. See `jaxcl.run.not_finite` for what it shows."""
    found = run.not_finite
    if not found:
        return ""
    rows = [
        [str(number), _steps(order["first"], order["last"]), f"{order['count']:,}", _named(order)]
        for number, order in enumerate(found["orders"], start=1)
    ]
    note = (
        f"The last steps of task {text(found['task'])} and the rows of their batches, numbered from 0 in the training "
        "data, for each order in which they were read. Started again, the run goes on from its last checkpoint."
    )
    return section(
        "Why it stopped",
        f'<p class="warn">{text(found["message"])}</p>',
        table(["Order", "Steps", "Rows", "Numbers of the rows"], rows, numbers=(0, 1, 2)),
        _suspects(found["in_all_orders"]),
        note=note,
    )


def _steps(first: int, last: int) -> str:
    return f"{last:,}" if first == last else f"{first:,} to {last:,}"


def _suspects(rows: Mapping[str, Any] | None) -> str:
    if rows is None:
        return ""
    if not rows["count"]:
        return (
            "<p>No row was in all orders: it is hardly the data. Lower the learning rate or lengthen its warm-up.</p>"
        )
    return f'<p class="warn">Rows that were in all orders: {rows["count"]:,}. Look at them: {_named(rows)}.</p>'


def _named(rows: Mapping[str, Any]) -> str:
    shown = "; ".join(f"{name}: {', '.join(str(row) for row in numbers)}" for name, numbers in rows["rows"].items())
    more = rows["count"] - sum(map(len, rows["rows"].values()))
    return text(shown) + (f" and {more:,} more" if more > 0 else "")
