"""Pages that compare runs of several methods and seeds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxcl.reporting.comparison_data import collect, comparison_table, read_comparison
from jaxcl.reporting.comparison_page import render, render_overview
from jaxcl.reporting.page import write_page

__all__ = ["collect", "comparison_table", "read_comparison", "write_comparison", "write_overview"]


def write_comparison(folder: Path, runs: Sequence[Path], sweep: Mapping[str, Any] | None = None) -> Path:
    """Writes `comparison.json` and `comparison.html` into a folder.

    Args:
      folder: where to write; created if absent.
      runs: run folders with the same tasks and metrics; methods are listed in the order of their first run.
      sweep: what was swept, see `collect`; the page then shows the frontier, and the chosen settings in detail.

    Returns:
      The page.

    Raises:
      UserError: no runs, a run without usable results, or runs with different tasks; names the folder.
    """
    folder = Path(folder)
    content = collect(folder, [Path(run) for run in runs], sweep)
    folder.mkdir(parents=True, exist_ok=True)
    write_page(folder / "comparison.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    path = folder / "comparison.html"
    write_page(path, render(content))
    return path


def write_overview(path: Path, comparisons: Mapping[str, Path], title: str) -> Path:
    """Writes one page about several comparisons, each with its summary and a link to its page.

    Args:
      path: the page to write.
      comparisons: folders written by `write_comparison`, by heading.
      title: heading of the page.

    Returns:
      The page.

    Raises:
      UserError: a folder does not contain a comparison.
    """
    path = Path(path)
    parts = []
    for heading, folder in comparisons.items():
        link = Path(os.path.relpath(Path(folder) / "comparison.html", path.parent)).as_posix()
        parts.append((heading, link, read_comparison(folder)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, render_overview(title, parts))
    return path
