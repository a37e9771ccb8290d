"""The data of comparisons: runs of several methods and seeds over the same sequence of tasks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxcl.errors import UserError
from jaxcl.reporting.frontier import Point, choose, measured
from jaxcl.reporting.page import number
from jaxcl.reporting.run_data import ODD, directions, read_results, scores, unit

#: Compared measures, in the order of the table's columns: field, heading, whether more is better.
MEASURES: tuple[tuple[str, str, bool], ...] = (
    ("op", "OP", True),
    ("bwt", "BWT", True),
    ("gain", "Gain", True),
    ("forgetting", "Forgetting", False),
    ("fwt", "FWT", True),
    ("intransigence", "Intransigence", False),
    ("seconds", "Seconds", False),
)


#: Compared fields of the further measures: field, heading.
FURTHER: tuple[tuple[str, str], ...] = (
    ("op", "OP"),
    ("bwt", "BWT"),
    ("forgetting_rate", "Forgetting rate"),
    ("gain", "Gain"),
)
#: Fields that are changes, shown with a sign.
SIGNED = ("bwt", "fwt", "gain")


def read_comparison(folder: Path) -> dict[str, Any]:
    """Reads `comparison.json`.

    Raises:
      UserError: the file is missing or damaged.
    """
    path = Path(folder) / "comparison.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["tasks"], comparison_table(content)  # what the table needs, the page needs, too
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ODD:
        raise UserError(f"{path}: not a jaxcl comparison") from None
    return dict(content)


def collect(folder: Path, runs: Sequence[Path], sweep: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of `comparison.json`.

    Args:
      folder: folder to which the paths of runs are relative.
      runs: run folders.
      sweep: of a sweep `keys`, what was swept; `settings`, for each run what is special about it, in words; `failed`,
        why runs failed, by their title.

    Returns:
      `tasks`, `metric`, `higher_is_better` and `unit`; `runs`: results and `folder` of each run; `methods`: for each
      method its `seeds` and, by measure, `mean`, `std` (sample standard deviation; `null` for a single run) and
      `values` (one per seed). `intransigence` is relative to the mean of the joint runs, if there are any. `further`
      contains `op`, `bwt`, `forgetting_rate` and `gain` of the other measures. Of a sweep, `runs` and `methods` contain
      the chosen settings only; `sweep` has `keys` and `failed`, `chosen_by` (by method), and `points`: the `method`,
      `setting` and `runs` of every setting, and whether it was `chosen`.
    """
    if not runs:
        raise UserError("comparison: no runs to compare", exit_code=2)
    results = [(run, read_results(run)) for run in runs]
    first = results[0][1]
    for run, result in results:
        for name in ("tasks", "metric"):
            if result[name] != first[name]:
                raise UserError(
                    f"{run}: has {name} {result[name]}, {runs[0]} has {first[name]}; compare runs of the same sequence"
                )
    reference = _reference([result for _, result in results])
    rows = [_row(folder, run, result, reference) for run, result in results]
    swept = {}
    if sweep is not None:
        details = [{**row, **measured(result)} for row, (_, result) in zip(rows, results, strict=True)]
        points, by = choose(_points(details, sweep["settings"]), directions(first))
        chosen = {row["folder"] for point in points if point.chosen for row in point.rows}
        rows = [row for row in rows if row["folder"] in chosen]
        plain = [{**point._asdict(), "runs": [_of_sweep(row) for row in point.rows]} for point in points]
        for one in plain:
            del one["rows"]
        swept = {"sweep": {"keys": sweep["keys"], "failed": sweep["failed"], "chosen_by": by, "points": plain}}
    methods = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        methods[method] = {
            "seeds": [row["seed"] for row in own],
            **{name: _summary([row.get(name) for row in own]) for name, _, _ in MEASURES},
            "further": {
                name: {part: _summary([row["further"][name].get(part) for row in own]) for part, _ in FURTHER}
                for name in own[0]["further"]
                if all(name in row["further"] for row in own)
            },
        }
    return {
        "tasks": first["tasks"],
        "metric": first["metric"],
        "higher_is_better": directions(first),
        "unit": unit(first),
        "methods": methods,
        "runs": rows,
        **swept,
    }


def comparison_table(content: Mapping[str, Any]) -> str:
    """The summary as plain text: one line per method, with mean ± standard deviation over seeds.

    Args:
      content: the result of `collect` or `read_comparison`.
    """
    shown = [(name, title) for name, title, _ in MEASURES if _any(content, name)]
    points = content.get("sweep", {}).get("points", [])
    settings = {one["method"]: f" ({one['setting']})" for one in points if one["chosen"] and one["setting"]}
    lines = [["method", *(title for _, title in shown)]]
    for method, summary in content["methods"].items():
        lines.append(
            [method + settings.get(method, ""), *(spread(summary[name], signed=name in SIGNED) for name, _ in shown)]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in
                  enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )  # fmt: skip


def spread(summary: Mapping[str, Any], *, signed: bool = False) -> str:
    """`mean ± std`, or the mean alone for a single run.

    >>> spread({"mean": -3.14, "std": 0.52, "values": [-3.6, -2.7]}, signed=True)
    '−3.1 ± 0.5'
    """
    if summary["mean"] is None:
        return number(None)
    deviation = "" if summary["std"] is None else f" ± {number(summary['std'])}"
    return number(summary["mean"], signed=signed) + deviation


def _any(content: Mapping[str, Any], name: str) -> bool:
    return any(summary[name]["mean"] is not None for summary in content["methods"].values())


def _row(
    folder: Path, run: Path, result: dict[str, Any], reference: Float[np.ndarray, " tasks"] | None
) -> dict[str, Any]:
    kept = (
        "method", "seed", "joint", "finished", "matrix", "initial", "deviation", "initial_deviation",
        "op", "bwt", "fwt", "gain", "forgetting", "seconds",
    )  # fmt: skip
    further = result.get("further") or {}
    return {
        "folder": Path(os.path.relpath(run, folder)).as_posix(),
        **{name: result.get(name) for name in kept},
        "intransigence": _intransigence(result, reference),
        "further": {name: {field: part.get(field) for field, _ in FURTHER} for name, part in further.items()},
    }


def _points(rows: Sequence[Mapping[str, Any]], settings: Sequence[str]) -> list[Point]:
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row, setting in zip(rows, settings, strict=True):
        grouped.setdefault((row["method"], setting), []).append(row)
    return [Point(method, setting, own) for (method, setting), own in grouped.items()]


def _of_sweep(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("folder", "seed", "op", "bwt", "learned", "anytime", "dev", "seconds")}


def _reference(results: Sequence[dict[str, Any]]) -> Float[np.ndarray, " tasks"] | None:
    rows = [scores(result)[-1] for result in results if result.get("joint") and result["matrix"]]
    return np.mean(rows, axis=0) if rows else None


def _intransigence(result: dict[str, Any], reference: Float[np.ndarray, " tasks"] | None) -> float | None:
    """Mean over tasks of the joint score minus the score right after learning the task."""
    matrix = scores(result)
    if reference is None or result.get("joint") or not len(matrix):
        return None
    sign = np.where(directions(result)[: len(matrix)], 1.0, -1.0)
    gap = float((sign * (reference[: len(matrix)] - np.diagonal(matrix)[: len(matrix)])).mean())
    return gap if np.isfinite(gap) else None


def _summary(values: Sequence[Any]) -> dict[str, Any]:
    known = [float(value) for value in values if isinstance(value, int | float) and np.isfinite(value)]
    return {
        "mean": float(np.mean(known)) if known else None,
        "std": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "values": known,
    }
