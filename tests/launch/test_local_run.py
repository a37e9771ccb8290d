"""A whole run as two processes by `launch/local.sh`, against one process with the same devices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.tiny.runs import DECODER, TOKENIZER

LOCAL = Path(__file__).parents[2] / "launch" / "local.sh"
# All that is split by process: replay with a teacher store, writing answers, loss of a text, an end task.
CONFIG: dict[str, Any] = {
    "model": {**DECODER, "num_layers": 1},
    "tokenizer": TOKENIZER,
    "data": {"prompt_length": 64, "answer_length": 24, "buckets": 1, "length": 88, "packing": False},
    "tasks": [
        {"name": "direction", "source": "stdlib:unicode_bidi", "train": 32, "test": 6},
        {
            "name": "topics",
            "source": "stdlib:python_topics",
            "train": 32,
            "test": 6,
            "end_task": {"source": "stdlib:python_topic_names", "train": 12, "dev": 6, "test": 6},
        },
    ],
    "method": {
        "name": "seekr",
        "layer_budget": 1,
        "head_budget": 1,
        "query_budget": 8,
        "replay": {"fraction": 0.25, "every": 2},
    },
    "training": {"batch_size": 8, "steps": 4, "log_every": 1},
    "optimizer": {"learning_rate": 1e-3},
    "evaluation": {
        "batch_size": 4,
        "max_new_tokens": 24,
        "end_tasks": "last",
        "end_task": {"epochs": 1, "batch_size": 4, "length": 32},
    },
}

pytestmark = [
    pytest.mark.slow,  # tests/training/test_two_processes.py has two processes in the fast part
    pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash"),
]


def run(folder: Path, processes: int) -> tuple[Path, str]:
    """The run folder, and what was printed."""
    config = folder / "a config.yaml"
    output = folder / f"run {processes}"
    config.write_text(yaml.safe_dump({**CONFIG, "output": "replaced"}))
    done = subprocess.run(
        [str(LOCAL), "--devices", "2", str(processes), "run", str(config), f"output={output}"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return output, done.stdout


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("local")
    alone, _ = run(folder, 1)
    together, printed = run(folder, 2)
    return alone, together, printed


def test_two_processes_give_the_numbers_of_one(both: tuple[Path, Path, str]) -> None:
    alone, together, _ = both
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in both[:2]]
    assert [(row["step"], row["kind"]) for row in rows[0]] == [(row["step"], row["kind"]) for row in rows[1]]
    assert {row["kind"] for row in rows[0]} == {"task", "memory"}
    for name in ("loss", "grad_norm", "param_norm"):
        np.testing.assert_allclose([row[name] for row in rows[1]], [row[name] for row in rows[0]], rtol=1e-5)
    results = [json.loads((folder / "results.json").read_text()) for folder in (alone, together)]
    for one, other in zip(results[0]["matrix"], results[1]["matrix"], strict=True):
        assert np.array(other, float) == pytest.approx(np.array(one, float), rel=1e-4, nan_ok=True)
    assert results[1]["further"].keys() == results[0]["further"].keys()
    for name, measure in results[0]["further"].items():
        assert results[1]["further"][name]["matrix"] == measure["matrix"], name
    assert len(results[1]["further"]) >= 2  # the end task among them


def test_each_process_stores_its_own_rows_and_the_first_prints_and_writes_the_rest(
    both: tuple[Path, Path, str],
) -> None:
    alone, together, printed = both
    assert len(list((alone / "teacher").iterdir())) == 2
    stores = sorted(path.name for path in (together / "teacher").iterdir())
    assert stores == [f"task{task:02d}_process{process:03d}.array_record" for task in (0, 1) for process in (0, 1)]
    assert printed.splitlines()[-1] == str(together / "report.html")
    assert printed.count("report.html") == 1
    predictions = [sorted((folder / "predictions").iterdir()) for folder in (alone, together)]
    assert [path.name for path in predictions[1]] == [path.name for path in predictions[0]]
    assert [path.read_text() for path in predictions[1]] == [path.read_text() for path in predictions[0]]
