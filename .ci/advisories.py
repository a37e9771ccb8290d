"""Prints the known vulnerabilities in a report of pip-audit, a line each: `python .ci/advisories.py REPORT`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path


def advisories(report: Path) -> Iterator[str]:
    """A line for each vulnerability: the package, its version, the advisory and where it is mended."""
    for package in json.loads(report.read_text())["dependencies"]:
        for one in package.get("vulns", []):
            names = ", ".join([one["id"], *one.get("aliases", [])])
            mended = ", ".join(one.get("fix_versions", [])) or "no version"
            yield f"{package['name']} {package['version']}: {names}; mended in {mended}"


if __name__ == "__main__":
    for line in advisories(Path(sys.argv[1])):
        print(f"audit: {line}")
