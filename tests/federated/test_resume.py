"""Federated runs that are killed and go on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxcl.config import parse_config
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.run.client import Client
from jaxcl.run.federation import federate
from jaxcl.run.model import load_model
from tests.federated.helpers import SHORT, rounds
from tests.tiny.faults import Interrupted, killed_at_save
from tests.tiny.networks import assert_equal_bits
from tests.tiny.runs import SEEKR, numbers

pytestmark = pytest.mark.optimised  # bits are compared

SECTION: dict[str, Any] = {
    "clients": 2,
    "rounds": 3,
    "steps": 1,
    "server": {"name": "fedavgm", "learning_rate": 0.9, "momentum": 0.5},
    "control_variates": True,
}
CONTENT: dict[str, Any] = {**SHORT, "training": {**SHORT["training"], "checkpoint_every": 1}}


@contextlib.contextmanager
def killed_in(name: str, task: int, client: int, *, call: int = 1) -> Iterator[None]:
    """The run in the block is killed when a client has done what it was asked for in a task."""
    method, calls = getattr(Client, name), 0

    def do_or_die(self: Client, index: int, *rest: Any) -> Any:
        nonlocal calls
        found = method(self, index, *rest)
        calls += (index, self.number) == (task, client)
        if calls == call:
            raise Interrupted
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Client, name, do_or_die)
        with pytest.raises(Interrupted):
            yield


@pytest.mark.parametrize(
    "method", [{"name": "replay", "replay": {"fraction": 0.25}}, pytest.param(SEEKR, marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_bits(method: Any, tmp_path: Path) -> None:
    def go(folder: str) -> Results:
        content = {**CONTENT, "output": str(tmp_path / folder), "method": method, "federated": SECTION}
        return federate(parse_config(content)).results

    expected = go("whole")
    for kill in (
        killed_in("begin", 0, 1),
        killed_in("train", 0, 1, call=2),
        killed_at_save(2),  # one client has saved the third round, the other one and the server have not
        killed_in("conclude", 0, 1),
        killed_in("store", 0, 0),
        killed_at_save(3, before=True),  # both clients have saved the task as learned, the server has not
        killed_in("train", 1, 0, call=2),
        killed_in("conclude", 1, 0),
    ):
        with kill:
            go("killed")
    found = go("killed")
    assert found.finished
    assert (found.matrix, found.initial, found.data) == (expected.matrix, expected.initial, expected.data)
    assert rounds(tmp_path / "killed") == rounds(tmp_path / "whole")
    assert len([row for row in rounds(tmp_path / "killed") if row["kind"] == "round"]) == 6
    assert_equal_bits(load_model(str(tmp_path / "killed")).params, load_model(str(tmp_path / "whole")).params)
    for client in "01":
        own, other = (tmp_path / folder / "clients" / client for folder in ("killed", "whole"))
        assert numbers(own) == numbers(other)
        assert (own / "memory.json").read_bytes() == (other / "memory.json").read_bytes()


def test_rounds_are_not_repeated_for_what_follows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the clients consolidate a task, with no checkpoint between its rounds."""
    content = {**SHORT, "training": {**SHORT["training"], "checkpoint_every": 0}, "output": str(tmp_path)}
    content |= {"method": {"name": "replay", "replay": {"fraction": 0.25}}, "federated": SECTION}
    tasks, train = list[int](), Client.train

    def noted(self: Client, index: int, *rest: Any) -> Any:
        tasks.append(index)
        return train(self, index, *rest)

    monkeypatch.setattr(Client, "train", noted)
    with killed_in("conclude", 0, 1):
        federate(parse_config(content))
    with killed_in("store", 0, 0):
        federate(parse_config(content))
    assert federate(parse_config(content)).results.finished
    assert [tasks.count(index) for index in range(2)] == [6, 6]


def test_a_client_without_the_checkpoint_that_the_server_needs_is_named(tmp_path: Path) -> None:
    content = {**CONTENT, "output": str(tmp_path), "method": "sequential", "federated": SECTION}
    with killed_in("train", 0, 1, call=2):
        federate(parse_config(content))
    for path in sorted((tmp_path / "clients" / "1" / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=r"clients/1: checkpoint 0, which belongs to the server's, is missing"):
        federate(parse_config(content))
