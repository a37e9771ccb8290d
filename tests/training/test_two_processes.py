"""Two processes with two devices each against one process with one device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny.devices import flags

ROOT = Path(__file__).parents[2]


def start(folder: Path, name: str, checkpoints: str, **settings: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **settings}
    script = "tests.training.two_processes_script"
    command = [sys.executable, "-m", script, str(folder / checkpoints), str(folder / name)]
    with open(folder / f"{name}.err", "wb") as errors:
        return subprocess.Popen(command, env=environment, stderr=errors, cwd=ROOT)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = {"alone": start(folder, "alone", "checkpoints-alone")}
    for index in range(2):
        running[f"process{index}"] = start(
            folder,
            f"process{index}",
            "checkpoints",
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
            XLA_FLAGS=flags(2),
        )
    try:
        for name, process in running.items():
            assert process.wait(timeout=600) == 0, (folder / f"{name}.err").read_text()[-3000:]
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return {name: json.loads((folder / name).read_text()) for name in running}


def test_interrupted_on_one_process_both_stop_go_on_and_end_where_one_process_does(results: dict[str, Any]) -> None:
    alone = results["alone"]
    for index in range(2):
        part = results[f"process{index}"]
        np.testing.assert_allclose(part["losses"], alone["losses"], rtol=1e-5)
        for got, expected in zip(part["params"], alone["params"], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_row_of_one_process_that_is_not_finite_is_the_same_to_both(results: dict[str, Any]) -> None:
    """All decide alike: one that went back to a checkpoint alone would wait for the others forever."""
    alone = results["alone"]["not_finite"]
    assert (alone["step"], alone["skipped"], alone["streak"]) == (5, 3, 2)
    assert "steps 4 to 5 of 6" in alone["message"]
    for index in range(2):
        assert results[f"process{index}"]["not_finite"] == alone


def test_what_process_0_cannot_read_or_finds_damaged_is_the_same_to_both(results: dict[str, Any]) -> None:
    """A process that went on from another checkpoint than the others would wait for them forever."""
    for name in ("alone", "process0", "process1"):
        found = results[name]["read_errors"]
        assert (found["once"], found["elsewhere"], found["damaged"], found["left"]) == (1, 1, 0, [0]), name
        assert "cannot be read: Input/output error (4 attempts); nothing was removed" in found["always"]
        assert found["always"] == results["process0"]["read_errors"]["always"] or name == "alone"


def test_a_total_that_one_process_stops_is_continued_by_both(results: dict[str, Any]) -> None:
    """They stop by the vote of the batch before, the second one. A file that one cannot use is used by none."""
    assert results["alone"]["stopped"] == {"added": [5, 1, 4, 5], "same": True}
    for index in range(2):
        assert results[f"process{index}"]["stopped"] == {"added": [5, 2, 3, 5], "same": True}


def test_each_process_hands_on_its_own_rows(results: dict[str, Any]) -> None:
    parts = [results[f"process{index}"] for index in range(2)]
    assert parts[0]["count"] + parts[1]["count"] == results["alone"]["count"] == 11
    assert not parts[0]["seen"].keys() & parts[1]["seen"].keys()
    assert parts[0]["seen"] | parts[1]["seen"] == results["alone"]["seen"]


def test_compiled_functions_of_methods_see_the_whole_batch(results: dict[str, Any]) -> None:
    for index in range(2):
        assert results[f"process{index}"]["sum"] == pytest.approx(results["alone"]["sum"], rel=1e-5)
