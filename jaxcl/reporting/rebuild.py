"""Rebuilds the page of a run, a comparison, or several comparisons."""

from __future__ import annotations

from pathlib import Path

from jaxcl.errors import UserError
from jaxcl.reporting.comparison import read_comparison, write_comparison, write_overview
from jaxcl.reporting.report import write_report
from jaxcl.reporting.run_data import ODD


def rebuild(folder: Path) -> Path:
    """Rebuilds the page of a folder.

    Args:
      folder: a run folder; a folder written by `jaxcl compare`; or a folder of several such folders, for which an
        overview `index.html` is written.

    Returns:
      The page.

    Raises:
      UserError: the folder has nothing to report; the message names it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    try:
        return _rebuild(folder)
    except ODD as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder}: its files do not hold what runs write: {reason}") from error


def _rebuild(folder: Path) -> Path:
    if (folder / "comparison.json").is_file():
        content = read_comparison(folder)
        if (sweep := content.get("sweep")) is None:
            return write_comparison(folder, [folder / str(run["folder"]) for run in content["runs"]])
        pairs = [(one["setting"], run["folder"]) for one in sweep["points"] for run in one["runs"]]
        runs = [folder / str(run) for _, run in pairs]
        return write_comparison(folder, runs, {**sweep, "settings": [setting for setting, _ in pairs]})
    comparisons = sorted(path.parent for path in folder.glob("*/comparison.json"))
    if comparisons and not (folder / "results.json").is_file():
        return write_overview(folder / "index.html", {path.name: path for path in comparisons}, folder.name)
    return write_report(folder)
