from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxcl.errors import UserError
from jaxcl.sharding import processes
from jaxcl.sharding.clusters import ProcessId
from jaxcl.sharding.processes import initialize
from tests.tiny.devices import flags

KEYS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAXCL_HOSTS", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ProcessId, float]]:
    """The places and timeouts that roll calls were made for; jax's runtime is not started."""
    made: list[tuple[ProcessId, float]] = []
    for key in (*KEYS, "TPU_WORKER_HOSTNAMES", "JAXCL_START_TIMEOUT", "JAXCL_PEER_TIMEOUT"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(processes, "_joined", False)
    monkeypatch.setattr(processes, "_watch", None)
    monkeypatch.setattr(processes, "_start_runtime", lambda place, patience: None)
    monkeypatch.setattr(processes, "_check_devices", lambda place: None)

    def roll_call(place: ProcessId, versions: object, timeout: float, token: str) -> dict[int, socket.socket]:
        made.append((place, timeout))
        return {}

    monkeypatch.setattr(processes, "roll_call", roll_call)
    return made


def test_one_process_needs_nothing(joined: list) -> None:
    assert not initialize()
    assert not initialize("host:1", 1, 0)
    assert joined == []


def test_arguments_come_before_the_environment(joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in zip(KEYS, ("host:1", "4", "2"), strict=False):
        monkeypatch.setenv(key, value)
    assert initialize(process_id=3, timeout=7)
    assert initialize()
    assert joined == [(ProcessId("host", 1, 4, 3), 7)]


def test_the_time_to_wait_is_a_setting(joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXCL_START_TIMEOUT", "12.5")
    assert initialize("host:1", 2, 0)
    assert joined == [(ProcessId("host", 1, 2, 0), 12.5)]
    monkeypatch.setattr(processes, "_joined", False)
    for wrong in ("soon", "0", "nan"):
        monkeypatch.setenv("JAXCL_START_TIMEOUT", wrong)
        with pytest.raises(UserError, match=f"JAXCL_START_TIMEOUT={wrong}: expected a positive number"):
            initialize("host:1", 2, 0)


def test_alone_everything_is_done_here() -> None:
    done: list[int] = []
    processes.on_first(lambda: done.append(1))
    processes.wait_for_all("now")
    processes.leave(1)
    assert done == [1]
    assert processes.is_first()


def test_a_runtime_that_does_not_start_is_one_line(joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("UNAVAILABLE: lost\nwith a trace")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(UserError, match=r"could not join the run's other processes at host:1: UNAVAILABLE: lost$"):
        processes._start_runtime(ProcessId("host", 1, 2, 0), 60)


def run_two(file: Path, devices: tuple[int, int]) -> list[tuple[int, str]]:
    """Exit code and output of two real processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = Path(__file__).with_name("processes_script.py")
    running = []
    for index in range(2):
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
            "XLA_FLAGS": flags(devices[index]),
        }
        running.append(
            subprocess.Popen(
                [sys.executable, str(script), str(file)],
                env={**os.environ, **settings},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
    try:
        return [(process.wait(timeout=600), process.stdout.read() if process.stdout else "") for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()


def test_different_numbers_of_devices_are_one_line_in_both(tmp_path: Path) -> None:
    told = "processes must have equal numbers of devices: process 0 has 1, process 1 has 2\n"
    assert run_two(tmp_path / "file", (1, 2)) == [(1, told), (1, told)]


def test_the_first_writes_for_all_and_failures_end_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    (first, said), (second, nothing) = run_two(tmp_path / "file", (1, 1))
    assert (first, second) == (8, 9)
    assert (said.splitlines()[-1], "alone" in nothing) == ("alone", False)  # jax itself prints a line
    assert time.monotonic() - started < 100  # jax's own end waits 300 s for a process that is gone


def test_the_token_comes_from_the_environment(joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[str] = []

    def roll_call(place: ProcessId, versions: object, timeout: float, token: str) -> dict[int, socket.socket]:
        tokens.append(token)
        return {}

    monkeypatch.setattr(processes, "roll_call", roll_call)
    monkeypatch.setenv("JAXCL_TOKEN", "secret")
    assert initialize("host:1", 2, 0)
    assert tokens == ["secret"]
