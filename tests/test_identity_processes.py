"""Processes that read copies of the data of their own learn only if these are the same."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_identity import TINY, shuffle, write_data

pytestmark = pytest.mark.slow


def start(folder: Path, copies: list[Path], *, apart: bool = False) -> list[tuple[int, str]]:
    """Starts a process for each copy of the data, perhaps in that folder; their exit codes and last lines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "jaxcl", "run", str(folder / "config.yaml")],
            env={**common, "JAX_PROCESS_ID": str(index), "JAXCL_DATA": str(copy)},
            cwd=copy if apart else None,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for index, copy in enumerate(copies)
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [(process.returncode, error) for process, error in zip(running, errors, strict=True)]


def test_copies_that_differ_are_one_line_in_every_process_before_training(tmp_path: Path) -> None:
    copies = [write_data(tmp_path / name) for name in ("first", "second")]
    content = {**TINY, "tasks": TINY["tasks"][:2], "training": {"batch_size": 8, "steps": 1}, "method": "sequential"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**content, "output": str(tmp_path / "run")}))
    assert [code for code, _ in start(tmp_path, copies)] == [0, 0]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**content, "output": str(tmp_path / "other")}))
    shuffle(copies[1] / "data/two/train.jsonl")
    for code, error in start(tmp_path, copies):
        assert code == 1
        assert "task two: process 1 reads something else than process 0; give all the same copy" in error
    assert not list((tmp_path / "other").glob("checkpoints/*"))
    # A finished run whose data lies elsewhere now is compared as well.
    for code, error in start_again(tmp_path, copies):
        assert code == 1
        assert "task two" in error


def start_again(folder: Path, copies: list[Path]) -> list[tuple[int, str]]:
    content = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**content, "output": str(folder / "run")}))
    return start(folder, copies[::-1])


def test_processes_with_folders_of_their_own_are_told_so(tmp_path: Path) -> None:
    """Folders of the same name on two machines: the first process's is a new run, the other one's an old copy of it."""
    copies = [write_data(tmp_path / name) for name in ("first", "second")]
    content = {**TINY, "tasks": TINY["tasks"][:2], "training": {"batch_size": 8, "steps": 1}, "method": "sequential"}
    places = {"output": f"file://{tmp_path}/bucket", "local_output": "here"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**content, **places}))
    for copy in copies:
        (copy / "here").mkdir()
    (copies[1] / "here/config.yaml").write_text("seed: 0")
    for code, error in start(tmp_path, copies, apart=True):
        assert code == 1
        assert "output here: process 1 does not see what process 0 wrote there; set local_output to a folder" in error
    assert not (copies[0] / "here/checkpoints").exists()
