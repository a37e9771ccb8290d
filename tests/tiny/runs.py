"""Configurations of runs that take seconds, and what runs of them logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.same_runs import restored
from jaxcl.config import parse_config
from jaxcl.evaluation.results import Results
from jaxcl.run import sequence
from jaxcl.training.checkpoint import Checkpoints

DECODER: dict[str, Any] = {
    "architecture": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "max_length": 96,
}
ENCODER: dict[str, Any] = {**DECODER, "architecture": "roberta", "max_length": 64}
TOKENIZER = {"vocab_size": 300, "train_rows": 50}

PAIRS: dict[str, Any] = {
    "model": DECODER,
    "tokenizer": TOKENIZER,
    "data": {"prompt_length": 64, "answer_length": 24, "buckets": 1},
    "tasks": [
        {"name": "direction", "source": "stdlib:unicode_bidi", "train": 32, "test": 4},
        {"name": "category", "source": "stdlib:unicode_category", "train": 24, "test": 4},
    ],
    "training": {"batch_size": 8, "epochs": 1, "log_every": 1, "checkpoint_every": 2},
    "optimizer": {"learning_rate": 1e-3},
    "evaluation": {"batch_size": 4, "max_new_tokens": 24, "before": True, "future": "next"},
}
SEEKR = {"name": "seekr", "layer_budget": 1, "head_budget": 1, "query_budget": 8, "replay": {"fraction": 0.25}}
TEXT: dict[str, Any] = {
    "model": ENCODER,
    "tokenizer": TOKENIZER,
    "data": {"length": 48, "packing": False},
    "tasks": [
        {
            "name": "topics",
            "source": "stdlib:python_topics",
            "train": 32,
            "test": 8,
            "end_task": {"source": "stdlib:python_topic_names", "train": 16, "dev": 8, "test": 8},
        },
        {"name": "pydantic", "source": "stdlib:docstrings:pydantic", "train": 24, "test": 8},
    ],
    "training": {"batch_size": 8, "steps": 3, "log_every": 1},
    "evaluation": {"batch_size": 8, "end_task": {"epochs": 1, "batch_size": 8, "length": 32}},
}


def run(content: dict[str, Any], output: Path, method: Any) -> Results:
    return sequence.run(parse_config({**content, "output": str(output), "method": method})).results


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The logged rows without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def stored(folder: Path, mark: str | None = None) -> tuple[Any, Any]:
    """Params and state of a run's last checkpoint, or the last one with a mark, as nested dicts."""
    with Checkpoints.reading(folder / "checkpoints") as checkpoints:
        saved = checkpoints.latest() if mark is None else checkpoints.find(mark)
        assert saved is not None, mark
        place = checkpoints.folder / str(saved.number)
    return restored(place / "params"), restored(place / "state")
