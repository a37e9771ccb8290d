"""Federated runs that take seconds, and what they wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxcl.config import parse_config
from jaxcl.evaluation.results import Results
from jaxcl.run.federation import federate
from tests.tiny.runs import DECODER, PAIRS, TEXT

SHORT: dict[str, Any] = {
    **PAIRS,
    "training": {"batch_size": 8, "log_every": 1},
    "evaluation": {"batch_size": 4, "limit": 2, "max_new_tokens": 24},
}
DOMAINS: dict[str, Any] = {
    **TEXT,
    "model": {**DECODER, "max_length": 64},
    "tasks": [{**task, "end_task": None} for task in TEXT["tasks"]],
    "training": {"batch_size": 8, "log_every": 1},
    "evaluation": {"batch_size": 8},
}


def federated(content: dict[str, Any], output: Path, method: Any, **section: Any) -> Results:
    """The results of a federated run."""
    content = {**content, "output": str(output), "method": method, "federated": section}
    return federate(parse_config(content)).results


def rounds(folder: Path) -> list[dict[str, Any]]:
    """The rows of `rounds.jsonl`."""
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
