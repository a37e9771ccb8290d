"""The continual-learning matrix as a table whose cells are coloured by score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxcl.reporting.page import number, text
from jaxcl.reporting.run_data import directions, scores, unit

_FEW = 4  # number of tasks up to which cells are large
_MANY = 7  # number of tasks from which names are vertical and cells are small
_LEAST_SPAN = 20.0  # smallest range of the colours in percent, so that noise does not look like forgetting


def matrix_table(results: Mapping[str, Any]) -> str:
    """The matrix with its initial row, and the change since learning below it.

    Args:
      results: content of `results.json`, or one of its further measures with `tasks` and `joint` added.
    """
    tasks = [str(task) for task in results["tasks"]]
    matrix, joint = scores(dict(results)), bool(results.get("joint"))
    rows = {f"after {index + 1} {task}": row for index, (task, row) in enumerate(zip(tasks, matrix, strict=False))}
    if joint:
        rows = {"after all tasks": matrix[0]} if len(matrix) else {}
    initial = results.get("initial")
    if initial is not None:
        before = np.array([np.nan if value is None else float(value) for value in initial])
        rows = {"before training": before, **rows}
    spreads = [list(row) for row in results.get("deviation") or []]
    if initial is not None:
        spreads = [list(results.get("initial_deviation") or []), *spreads]
    shares = _shares(np.array(list(rows.values())) if rows else matrix, results)
    start = -1 if initial is not None else 0
    body = "".join(
        f'<tr><th scope="row" title="{text(label)}">{text(label)}</th>'
        + "".join(
            _cell(score, shares[place, column], place + start, column, joint, _at(spreads, place, column))
            for column, score in enumerate(row)
        )
        + "</tr>"
        for place, (label, row) in enumerate(rows.items())
    )
    heads = "".join(
        f'<th scope="col" title="{text(task)}"><span class="name">{index + 1} {text(task)}</span></th>'
        for index, task in enumerate(tasks)
    )
    kind = "heat many" if len(tasks) > _MANY else "heat few" if len(tasks) <= _FEW else "heat"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody>'
        f"{'' if joint else _changes(matrix, directions(dict(results)), unit(dict(results)))}</table></div>"
    )


def _at(rows: Sequence[Sequence[float | None]], row: int, column: int) -> float | None:
    return rows[row][column] if row < len(rows) and column < len(rows[row]) else None


def _cell(score: float, share: float, row: int, column: int, joint: bool, spread: float | None) -> str:
    if not np.isfinite(score):
        return '<td class="none">·</td>'
    classes = ["cell"]
    if share > 0.6:
        classes.append("deep")
    if row == column and not joint:
        classes.append("learned")
    elif row < column and not (joint and row >= 0):
        classes.append("future")
    digits = 1 if abs(score) < 1000 else 0
    around = "" if spread is None else f" <small>± {number(spread)}</small>"
    return f'<td class="{" ".join(classes)}" style="--share: {100 * share:.0f}%">{number(score, digits)}{around}</td>'


def _changes(matrix: Float[np.ndarray, "rows tasks"], higher: list[bool], percent: str) -> str:
    """The last row minus the diagonal; improvements are green, whatever the metric's direction."""
    if len(matrix) < 2:
        return ""
    cells = []
    for column in range(matrix.shape[1]):
        change = matrix[-1, column] - matrix[column, column] if column < len(matrix) - 1 else np.nan
        if not np.isfinite(change):
            cells.append("<td></td>")
            continue
        better = change if higher[column] else -change
        tone = "" if round(abs(change), 1) == 0 else "good" if better > 0 else "bad"
        cells.append(f'<td class="{tone}">{number(change, signed=True)}</td>')
    return f'<tfoot><tr><th scope="row">since learned{", points" if percent else ""}</th>{"".join(cells)}</tr></tfoot>'


def _shares(values: Float[np.ndarray, "rows tasks"], results: Mapping[str, Any]) -> Float[np.ndarray, "rows tasks"]:
    """Depth of each cell's colour, 0.04 to 1; deeper is better. Columns with the same metric share a scale."""
    shares = np.zeros_like(values)
    metrics, higher = results["metric"], directions(dict(results))
    for metric in dict.fromkeys(metrics):
        columns = [index for index, name in enumerate(metrics) if name == metric]
        part = values[:, columns]
        known = part[np.isfinite(part)]
        if not len(known):
            continue
        if metric == "perplexity":
            part, known = np.log(np.maximum(part, 1e-9)), np.log(np.maximum(known, 1e-9))
            low, high = known.min(), max(known.max(), known.min() + 0.1)
        else:
            low, high = known.min(), max(known.max(), known.min() + _LEAST_SPAN)
        share = (part - low) / (high - low)
        shares[:, columns] = 0.04 + 0.96 * (share if higher[columns[0]] else 1 - share)
    return shares
