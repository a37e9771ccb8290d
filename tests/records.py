"""Rounds of chaos and fuzzing add up: each leaves a line per run or reader in a file of its day, and all are summed."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "records"


def append(folder: Path, line: dict[str, Any]) -> None:
    """Adds a line, with the day and the commit, to the file of the day."""
    folder.mkdir(parents=True, exist_ok=True)
    day = time.strftime("%Y-%m-%d")
    with open(folder / f"{day}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"day": day, "commit": _commit(), **line}) + "\n")


def lines(folder: Path) -> Iterator[dict[str, Any]]:
    """All lines of all days."""
    for path in sorted(folder.glob("*.jsonl")):
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
