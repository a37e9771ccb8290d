"""A signal to one of two processes between the steps of training: both stop after the same batch."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.same_runs import differences
from jaxcl.config.file import dump_yaml
from tests.test_task_end import files_of
from tests.tiny.devices import flags
from tests.tiny.runs import PAIRS, SEEKR

pytestmark = pytest.mark.slow

# Batches of four rows, eight of them in the memory and as many in the test set; each process has two devices.
CONTENT: dict[str, Any] = {
    **PAIRS,
    "method": {**SEEKR, "replay": {"fraction": 1.0, "choose": "highest_loss"}},
    "tasks": [{**PAIRS["tasks"][0], "test": 24}],
    "training": {"batch_size": 4, "steps": 2, "log_every": 1, "checkpoint_every": 0},
    "evaluation": {"batch_size": 4, "max_new_tokens": 24},
    "mesh": {"fsdp": 2},
}


def go(folder: Path, name: str, *stop: str, processes: int = 2) -> list[tuple[int, str]]:
    """Runs it, with a signal to the last process; exit codes and what the processes said."""
    config = folder / f"{name}.yaml"
    config.write_text(dump_yaml({**CONTENT, "output": str(folder / name)}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(4 // processes)}
    common |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)} if processes > 1 else {}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.stopped_script", str(config), *(stop if index == processes - 1 else ())],
            env={**common, "JAX_PROCESS_ID": str(index)} if processes > 1 else common,
            cwd=Path(__file__).parents[1],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        said = [process.communicate(timeout=600)[1] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [(process.returncode, words) for process, words in zip(running, said, strict=True)]


def test_both_stop_after_the_same_batch_and_end_where_undisturbed_ones_do(tmp_path: Path) -> None:
    assert [code for code, _ in go(tmp_path, "whole")] == [0, 0]
    for loop, batch in (("after 0.0", "3"), ("after 0.1", "2"), ("after 0.2", "4"), ("score 0 0.0", "2")):
        found = go(tmp_path, "run", loop, batch)
        assert [code for code, _ in found] == [130, 130], found
        kept = sorted(path.name for path in (tmp_path / "run/halfway").glob(f"{loop.replace(' ', '-')}_*.values"))
        assert len(kept) == 2
        if loop == "after 0.2":
            shutil.copytree(tmp_path / "run", tmp_path / "alone")
    for code, said in go(tmp_path, "run"):
        assert code == 0, said
        assert "done again" not in said
    assert not list(differences(tmp_path / "run", tmp_path / "whole"))
    for name in ("memory.json", "memory", "teacher", "predictions", "importance"):
        assert files_of(tmp_path / "run", name) == files_of(tmp_path / "whole", name), name
    assert len(list((tmp_path / "run/teacher").iterdir())) == 2

    # One process begins the phase anew, whose numbers are its own.
    (code, said), *_ = go(tmp_path, "alone", processes=1)
    assert code == 0, said
    assert "done again" not in said
    assert len(list((tmp_path / "alone/teacher").iterdir())) == 1
    assert not (tmp_path / "alone/halfway").exists()
