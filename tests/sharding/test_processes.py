from __future__ import annotations

import jax
import pytest

from jaxcl.errors import UserError
from jaxcl.sharding import processes
from jaxcl.sharding.processes import initialize

SETTINGS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
KEYS = (*SETTINGS, "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    made: list[dict] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: made.append(settings))
    return made


def test_one_process_needs_nothing(calls: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not initialize()
    assert not initialize("host:1", 1, 0)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert not initialize()
    assert calls == []


def test_arguments_come_before_the_environment(calls: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in zip(SETTINGS, ("host:1", "4", "2"), strict=True):
        monkeypatch.setenv(key, value)
    assert initialize(process_id=3, timeout=7)
    expected = {"coordinator_address": "host:1", "num_processes": 4, "process_id": 3, "initialization_timeout": 7}
    assert calls == [expected]


@pytest.mark.parametrize(("key", "value"), [("SLURM_STEP_NUM_TASKS", "2"), ("TPU_WORKER_HOSTNAMES", "a,b")])
def test_clusters_are_recognised(calls: list[dict], monkeypatch: pytest.MonkeyPatch, key: str, value: str) -> None:
    monkeypatch.setenv(key, value)
    assert initialize(timeout=5)
    assert calls == [{"initialization_timeout": 5}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "JAX_COORDINATOR_ADDRESS is set but JAX_NUM_PROCESSES, JAX_PROCESS_ID is not"),
        (("host:1", 2, 2), "JAX_PROCESS_ID=2 must be from 0 to JAX_NUM_PROCESSES-1 = 1"),
    ],
)
def test_incomplete_settings_are_one_line(calls: list[dict], arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        initialize(*arguments)


def test_numbers_that_are_none_are_one_line(calls: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in zip(SETTINGS, ("host:1", "two", "0"), strict=True):
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES=two"):
        initialize()


def test_others_that_never_come_are_one_line(calls: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**_: object) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED: barrier timed out")

    monkeypatch.setattr(processes.jax.distributed, "initialize", late)
    with pytest.raises(UserError, match="could not join the run's other processes at host:1 within 9 s: DEADLINE"):
        initialize("host:1", 2, 0, timeout=9)
