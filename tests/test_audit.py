"""`make audit` and what CI makes of it, with a stand-in for pip-audit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOUND = {
    "dependencies": [
        {"name": "fine", "version": "1", "vulns": []},
        {"name": "bad", "version": "2.0", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-2"], "fix_versions": ["2.1"]}]},
        {"name": "skipped", "skip_reason": "not on the index"},
    ]
}

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def audit(folder: Path, pip_audit: str) -> subprocess.CompletedProcess[str]:
    """The lines of `.ci/run` that call it, in a copy of what they need."""
    for name in ("Makefile", ".ci/advisories.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "pyproject.toml").touch()
    for environment, program, text in (("venv", "python", "echo fine==1"), ("tools", "pip-audit", pip_audit)):
        file = folder / environment / "bin" / program
        file.parent.mkdir(parents=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
        (folder / environment / ".installed").touch()
    lines = re.search(r"^timeout .*make audit \|\|\n.*$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert lines is not None
    settings = {"VENV": "venv", "TOOLS_VENV": "tools", "PYTHON": sys.executable, "MAKEFLAGS": "-e"}
    # Without the variables of `make test`, below which a make would say which directory it enters.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", lines[0]],
        cwd=folder,
        env={**outside, **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_vulnerability_is_printed_and_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text(json.dumps(FOUND))
    done = audit(
        tmp_path, "cp found.json build/audit.json; echo 'Found 1 known vulnerability in 1 package' >&2; exit 1"
    )
    assert done.returncode == 0
    found, line, warning = done.stdout.splitlines()
    assert found == "Found 1 known vulnerability in 1 package"
    assert line == "audit: bad 2.0: PYSEC-1, CVE-2; mended in 2.1"
    assert warning.startswith("WARNING: make audit found")


def test_a_registry_that_does_not_answer_is_said_and_fails_nothing(tmp_path: Path) -> None:
    done = audit(tmp_path, "echo 'ConnectionError: no route' >&2; exit 1")
    assert done.returncode == 0
    said = ["ConnectionError: no route", "audit: skipped, the registry does not answer; see build/audit.log"]
    assert done.stdout.splitlines() == said


def test_nothing_found_is_no_warning(tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text(json.dumps({"dependencies": FOUND["dependencies"][:1]}))
    done = audit(tmp_path, "cp found.json build/audit.json; echo 'No known vulnerabilities found' >&2")
    assert (done.returncode, done.stdout) == (0, "No known vulnerabilities found\n")
