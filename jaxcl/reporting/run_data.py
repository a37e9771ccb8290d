"""Reads a run folder for a report: missing files are left out, broken ones are listed as problems."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from jaxcl.errors import UserError

# Spikes of a task that are named; the others are counted.
_SPIKES = 10
#: What code raises for JSON values of other kinds than a run writes.
ODD = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)
_NEEDED = ("method", "seed", "tasks", "metric", "matrix")
# Above, a matrix needs a file that has its numbers. And what arrays of a file may take, which are compressed.
_MOST_CELLS, _MOST_BYTES = 2**20, 2**28
_OBJECTS = ("timing", "data", "versions", "further", "extra", "steps")


@dataclasses.dataclass(frozen=True)
class RunData:
    """The content of a run folder for a report.

    Attributes:
      folder: the run folder.
      results: `results.json`.
      config: text of `config.yaml`; empty if there is none.
      metrics: rows of `metrics.jsonl`.
      rounds: rows of `rounds.jsonl`, which a federated run has.
      predictions: rows of all files in `predictions/`, by `(after, task)`.
      thumbnails: PNG files of the images that predictions name.
      tables: arrays of the latest file in `importance/`, by name.
      not_finite: `not_finite.json`, which a run leaves that stopped for its numbers; else empty.
      problems: one line per file that could not be read.
    """

    folder: Path
    results: dict[str, Any]
    config: str
    metrics: list[dict[str, Any]]
    rounds: list[dict[str, Any]]
    predictions: dict[tuple[int, str], list[dict[str, Any]]]
    thumbnails: dict[str, bytes]
    tables: dict[str, Shaped[np.ndarray, "..."]]
    not_finite: dict[str, Any]
    problems: list[str]

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return [str(task) for task in self.results["tasks"]]

    @property
    def learned(self) -> int:
        """Number of tasks learned so far."""
        rows = len(self.results["matrix"])
        return len(self.tasks) if self.results.get("joint") and rows else rows


def read_run(folder: Path) -> RunData:
    """Reads a run folder.

    Raises:
      UserError: the folder does not exist or has no usable `results.json`.
    """
    problems: list[str] = []
    return RunData(
        folder=folder,
        results=read_results(folder),
        config=_text(folder / "config.yaml", problems),
        metrics=_json_lines(folder / "metrics.jsonl", problems),
        rounds=_json_lines(folder / "rounds.jsonl", problems),
        predictions=_predictions(folder / "predictions", problems),
        thumbnails=_thumbnails(folder / "thumbnails", problems),
        tables=_tables(folder / "importance", problems),
        not_finite=_object(folder / "not_finite.json", problems),
        problems=problems,
    )


def read_results(folder: Path) -> dict[str, Any]:
    """Reads `results.json` of a run folder; see `read_run`."""
    path = folder / "results.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not path.is_file():
        raise UserError(f"{folder}: not a run folder, or a run that has not evaluated anything yet (no results.json)")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    missing = [name for name in _NEEDED if not isinstance(results, dict) or name not in results]
    if missing:
        raise UserError(f"{path}: not a jaxcl result: {missing[0]!r} is missing")
    for name in _OBJECTS:
        if not isinstance(results.get(name), dict | None):
            raise UserError(f"{path}: not a jaxcl result: {name} is not an object")
    if not all(isinstance(seconds, int | float) for seconds in (results.get("timing") or {}).values()):
        raise UserError(f"{path}: not a jaxcl result: timing holds something else than seconds")
    try:
        scores(results)
    except ODD:
        raise UserError(f"{path}: not a jaxcl result: matrix is not a list of rows of numbers") from None
    return results


def scores(results: dict[str, Any]) -> Float[np.ndarray, "rows tasks"]:
    """The matrix of results (or of one of the further measures); NaN if not measured."""
    rows = results["matrix"]
    count = len(results["metric"])
    if len(rows) * count > max(_MOST_CELLS, sum(map(len, rows))):
        raise ValueError(f"{len(rows)} rows of {count} tasks, most of them empty")
    filled = np.full((len(rows), count), np.nan)
    for index, row in enumerate(rows):
        filled[index, : len(row)] = [np.nan if value is None else float(value) for value in row]
    return filled


def directions(results: dict[str, Any]) -> list[bool]:
    """For each task, whether a larger score is better."""
    default = [name != "perplexity" for name in results["metric"]]
    return list(results.get("higher_is_better") or default)


def watched(results: Mapping[str, Any]) -> list[str]:
    """A line for each task that skipped steps, went back to a checkpoint, or had spikes of the loss.

    Args:
      results: `results.json`; one of an earlier version has no such counts.

    Examples:
      >>> watched({"steps": {"a": 40}, "skipped": {"a": 3}, "spikes": {"a": [7, 20]}, "rewinds": {"a": 0}})
      ['a: 3 of 40 steps skipped, because loss or gradient was not finite; spikes of the loss at steps 7, 20']
    """
    lines = []
    for task, steps in (results.get("steps") or {}).items():
        skipped, rewinds, spikes = ((results.get(name) or {}).get(task) for name in ("skipped", "rewinds", "spikes"))
        parts = []
        if skipped:
            parts.append(f"{skipped:,} of {steps:,} steps skipped, because loss or gradient was not finite")
        if rewinds:
            times = "once" if rewinds == 1 else f"{rewinds} times"
            parts.append(f"went back to a checkpoint {times}, as too many steps in a row were not finite")
        if spikes:
            more = f" and {len(spikes) - _SPIKES:,} more" if len(spikes) > _SPIKES else ""
            named = ", ".join(str(step) for step in spikes[:_SPIKES])
            parts.append(f"spikes of the loss at step{'s' if len(spikes) > 1 else ''} {named}{more}")
        if parts:
            lines.append(f"{task}: {'; '.join(parts)}")
    return lines


def unit(results: dict[str, Any]) -> str:
    """`"%"` if all scores are percentages, else empty."""
    return "" if "perplexity" in results["metric"] else "%"


def _text(path: Path, problems: list[str]) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
        return ""


def _json_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    rows, bad = [], 0
    for line in _text(path, problems).split("\n"):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            bad += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
    if bad:
        problems.append(f"{path.name}: {bad} unreadable line{'s' if bad > 1 else ''} left out")
    return rows


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    content = _text(path, problems)
    try:
        found = json.loads(content) if content else {}
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    problems.append(f"{path.name}: cannot be read, left out")
    return {}


def _predictions(folder: Path, problems: list[str]) -> dict[tuple[int, str], list[dict[str, Any]]]:
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in _json_lines(path, problems):
            if isinstance(row.get("after"), int) and "task" in row:
                found.setdefault((row["after"], str(row["task"])), []).append(row)
    return found


def _thumbnails(folder: Path, problems: list[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.npz")):
        found |= {name: array.tobytes() for name, array in _arrays(path, "thumbnails", problems).items()}
    return found


def _tables(folder: Path, problems: list[str]) -> dict[str, Shaped[np.ndarray, "..."]]:
    # Latest first; the file from before any training comes last.
    files = sorted(folder.glob("*.npz"), key=lambda path: (path.name.startswith("after"), path.name), reverse=True)
    return next(filter(None, (_arrays(path, "importance", problems) for path in files)), {})


def _arrays(path: Path, folder: str, problems: list[str]) -> dict[str, Shaped[np.ndarray, "..."]]:
    try:
        # Opened here, because numpy does not close a file that is not an archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            if sum(part.file_size for part in stored.zip.infolist()) > _MOST_BYTES:
                raise ValueError(f"more than {_MOST_BYTES // 2**20} MiB of arrays")
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # zipfile, zlib and numpy have no error type for damaged files
        problems.append(f"{folder}/{path.name}: cannot be read: {str(error) or type(error).__name__}")
        return {}
