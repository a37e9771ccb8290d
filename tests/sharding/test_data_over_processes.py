"""Processes that share a folder encode rows together; the batches are those of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny.runs import DECODER
from tests.tiny.texts import TEXTS


def write_config(folder: Path) -> None:
    rows = [{"prompt": f"{TEXTS[n % 5]} number {n}", "answer": f"answer {n % 7}"} for n in range(150)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.txt").write_text("".join(f"{TEXTS[n % 5]} {n}".replace("\n", " ") + "\n" for n in range(300)))
    config = {
        "model": DECODER,
        "tokenizer": {"vocab_size": 300},
        "data": {"prompt_length": 64, "answer_length": 24, "length": 64, "cache": str(folder / "cache")},
        "tasks": [
            {"name": "pairs", "source": f"jsonl:{folder / 'rows.jsonl'}", "train": 90},
            {"name": "text", "source": f"text:{folder / 'rows.txt'}"},
        ],
        "training": {"batch_size": 8, "epochs": 1},
        "method": {"name": "sequential"},
        "output": str(folder / "run"),
    }
    (folder / "config.json").write_text(json.dumps(config))


def encode_with(count: int, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    write_config(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = Path(__file__).with_name("data_script.py")
    running = []
    for index in range(count):
        settings = {"JAX_PLATFORMS": "cpu"}
        if count > 1:
            settings |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
        command = [sys.executable, str(script), str(folder)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | settings, text=True))
    printed = [process.communicate(timeout=600)[0] for process in running]
    assert [process.returncode for process in running] == [0] * count
    return [json.loads(lines.splitlines()[-1]) for lines in printed]


@pytest.mark.slow
def test_processes_encode_together_and_read_the_rows_of_one_process(tmp_path: Path) -> None:
    (alone,) = encode_with(1, tmp_path / "one")
    assert len(set(alone["made"])) == len(alone["made"]) > 20
    for count in (2, 4):
        found = encode_with(count, tmp_path / str(count))
        made = [part for process in found for part in process["made"]]
        assert len(made) == len(set(made)) == len(alone["made"])
        assert all(len(process["made"]) >= len(made) // count - 4 for process in found)
        assert all(process["prints"] == alone["prints"] for process in found)
        for batch, rows in enumerate(alone["rows"]):
            assert [row for process in found for row in process["rows"][batch]] == rows
