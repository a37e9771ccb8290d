"""Says what is gone of a run that goes on: nothing that it needs, but it ends without what that held."""

from __future__ import annotations

import sys
from pathlib import Path

from jaxcl.evaluation.results import Results, predictions_file
from jaxcl.run.components import Components
from jaxcl.run.evaluator import scored_tasks
from jaxcl.run.folder import RunFolder


def say_missing_rows(path: Path, found: int, expected: int, words: str) -> None:
    """Prints a line if rows are gone.

    Args:
      path: the file that had them.
      found: how many there are.
      expected: how many there should be.
      words: what is counted.
    """
    if found < expected:
        missing = f"{expected - found} of {expected} {words}"
        print(f"{path}: {missing} are missing; the run goes on without them", file=sys.stderr)


def say_missing_predictions(parts: Components, folder: RunFolder, results: Results) -> None:
    """Prints a line if there are scores of prompts and answers whose predictions are gone.

    Args:
      parts: the parts of the run.
      folder: its folder.
      results: the results so far.
    """
    rows = enumerate([results.initial or [], *results.matrix], start=-1)
    missing = [
        path.name
        for after, row in rows
        for index in scored_tasks(parts, after)
        if parts.tasks[index].answered and index < len(row) and row[index] is not None
        if not (path := predictions_file(folder.predictions, after, index)).is_file()
    ]
    if missing:
        count = "1 file" if len(missing) == 1 else f"{len(missing)} files"
        print(
            f"{folder.predictions}: {count} missing of tasks that are scored, such as {missing[0]}; the run goes on "
            "without what was there",
            file=sys.stderr,
        )


__all__ = ["say_missing_predictions", "say_missing_rows"]
