"""Whole federated runs in one process."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.config import parse_config
from jaxcl.config.file import read_yaml
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.run import federation
from jaxcl.run.client import Client
from jaxcl.run.exchange import Trained
from jaxcl.run.model import load_model
from tests.federated.helpers import DOMAINS, SHORT, federated, rounds
from tests.tiny.networks import assert_equal_bits
from tests.tiny.runs import PAIRS, SEEKR, numbers, run

pytestmark = pytest.mark.optimised  # bits are compared

DAS = {"name": "das", "importance_examples": 8}


def files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for name in ("memory", "teacher") for path in (folder / name).glob("*"))


@pytest.mark.parametrize(
    "method", ["sequential", *(pytest.param(one, marks=pytest.mark.slow, id=one["name"]) for one in (DAS, SEEKR))]
)
def test_one_client_is_the_ordinary_run_to_the_bit(method: Any, tmp_path: Path) -> None:
    alone = run({**DOMAINS, "training": {**DOMAINS["training"], "steps": 4}}, tmp_path / "alone", method)
    together = federated(DOMAINS, tmp_path / "together", method, clients=1, rounds=2, steps=2)
    own = tmp_path / "together" / "clients" / "0"
    assert numbers(own) == numbers(tmp_path / "alone")
    assert_equal_bits(load_model(str(tmp_path / "together")).params, load_model(str(tmp_path / "alone")).params)
    assert together.matrix == alone.matrix
    assert together.finished
    # What is remembered stays with the client.
    assert files(own) == files(tmp_path / "alone")
    assert files(tmp_path / "together") == []
    for name in (tmp_path / "alone" / "importance").glob("*.npz"):
        with np.load(name) as expected, np.load(own / "importance" / name.name) as found:
            for key in expected:
                np.testing.assert_array_equal(found[key], expected[key])


def test_clients_learn_tasks_in_orders_of_their_own(tmp_path: Path) -> None:
    ordered = {**DOMAINS, "training": {**DOMAINS["training"], "steps": 2}, "tasks": DOMAINS["tasks"][::-1]}
    names = [task["name"] for task in DOMAINS["tasks"]]
    alone = run(ordered, tmp_path / "alone", "ewc")
    federated(DOMAINS, tmp_path / "one", "ewc", clients=1, rounds=1, steps=2, orders=[names[::-1]])
    assert numbers(tmp_path / "one" / "clients" / "0") == numbers(tmp_path / "alone")
    assert_equal_bits(load_model(str(tmp_path / "one")).params, load_model(str(tmp_path / "alone")).params)
    assert alone.tasks == names[::-1]
    found = federated(DOMAINS, tmp_path / "two", "ewc", clients=2, rounds=1, steps=1, orders=[names, names[::-1]])
    assert found.tasks == names
    for client, order in enumerate((names, names[::-1])):
        content = read_yaml(tmp_path / "two" / "clients" / str(client) / "config.yaml")
        assert [task["name"] for task in content["tasks"]] == order
    with pytest.raises(UserError, match=r"federated.orders.0: expected the names of all tasks \(.*\), each once"):
        federated(DOMAINS, tmp_path / "wrong", "ewc", clients=1, rounds=1, steps=1, orders=[names[:1]])


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clients, of which two are in a round; the third is hostile in the second task."""
    folder = tmp_path_factory.mktemp("runs") / "three"
    original = Client.train

    def train(self: Client, index: int, round_number: int, *rest: Any) -> Trained:
        sent = original(self, index, round_number, *rest)
        if self.name == "1":
            self.watch.skipped += 1
        if self.name == "2" and index == 1:
            return sent._replace(params=jax.tree.map(lambda leaf: leaf * np.float32(np.nan), sent.params))
        return sent

    section = {"clients": 3, "alpha": 1.0, "rounds": 3, "steps": 1, "participation": 0.6}
    server = {"name": "fedadam", "learning_rate": 1e-3}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Client, "train", train)
        federated(SHORT, folder, "sequential", **section, server=server)
    return folder


def test_a_hostile_update_is_refused_by_name_and_the_run_goes_on(three: Path) -> None:
    found = rounds(three)
    assert [len(row["clients"]) for row in found] == [2] * 6
    for row in found:
        hostile = row["task"] == 1 and "2" in row["clients"]
        assert list(row["refused"]) == (["2"] if hostile else [])
        assert row["update_norm"] > 0
    assert any(row["refused"] for row in found)
    params = load_model(str(three)).params
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    results = Results.read(three / "results.json")
    assert results.finished
    # Skipped steps are those of all clients.
    for task, name in enumerate(results.tasks):
        assert results.skipped[name] == sum(row["task"] == task and "1" in row["clients"] for row in found)


def test_clients_whose_answers_cannot_be_used_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights: dict[int, Any] = {0: math.nan, 1: math.inf, 2: "many"}
    original = Client.answer

    def answer(self: Client, what: str, *rest: Any) -> Any:
        arrays, words = original(self, what, *rest)
        if what == "describe" and self.number == 4:
            return arrays, {"data": words["data"]}
        return arrays, {"weight": weights.get(self.number, words["weight"])} if what == "begin" else words

    monkeypatch.setattr(Client, "answer", answer)
    content = {**DOMAINS, "tasks": DOMAINS["tasks"][:1]}
    federated(content, tmp_path, "sequential", clients=5, rounds=1, steps=1)
    (row,) = rounds(tmp_path)
    assert set(row["refused"]) == {"0", "1", "2"}
    assert 0 < row["update_norm"] < math.inf
    assert Results.read(tmp_path / "results.json").finished
    printed = capsys.readouterr().err
    assert "begin: client 1 is left out: its weight is inf" in printed
    assert "describe: client 4 is left out: its skipped is None" in printed


def test_clients_have_their_own_rows_noise_and_clock(three: Path) -> None:
    logs = {name: numbers(three / "clients" / name) for name in "012"}
    found = rounds(three)
    for name, rows in logs.items():
        there = [(row["task"], row["round"] + 1) for row in found if name in row["clients"]]
        assert [(row["task"], row["task_step"]) for row in rows] == there  # one step per round, at the server's time
    losses = [row["loss"] for rows in logs.values() for row in rows]
    assert len(set(losses)) == len(losses)
    sizes = json.loads((three / "results.json").read_text())["data"]["direction"]["clients"]
    assert sum(one["examples"] for one in sizes.values()) == 32
    floats = sum(leaf.size for leaf in jax.tree.leaves(load_model(str(three)).params))
    assert {row["bytes_up"] for row in found} == {2 * 4 * floats}


def test_a_finished_run_is_read(three: Path, tmp_path: Path) -> None:
    content = json.loads((three / "results.json").read_text())
    section = {"clients": 3, "alpha": 1.0, "rounds": 3, "steps": 1, "participation": 0.6}
    server = {"name": "fedadam", "learning_rate": 1e-3}
    before = rounds(three)
    assert federated(SHORT, three, "sequential", **section, server=server).matrix == content["matrix"]
    assert rounds(three) == before


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"training": {"steps": 3}}, "training.steps, training.epochs: with federated, rounds times steps"),
    "privacy": ({"training": {"privacy": {"clip": 1.0, "noise_multiplier": 1.0}}}, "training.privacy: not with"),
    "average": ({"optimizer": {"average": "ema"}}, "optimizer: with federated, average must be none"),
    "schedule": ({"optimizer": {"schedule": "wsd"}}, "optimizer: with federated, average must be none"),
    "joint": ({"method": "joint"}, "method.name: joint has no params that are the same"),
    "one": ({"method": "one"}, "method.name: one has no params that are the same"),
    "no section": ({"federated": None}, "federated: the section is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_federated_is_refused(name: str) -> None:
    changes, words = REFUSED[name]
    section = {"clients": 2, "rounds": 1, "steps": 1}
    content = {**PAIRS, "training": {"batch_size": 8}, "output": "unused", "method": "sequential", "federated": section}
    with pytest.raises(UserError, match=words):
        federation.check_federated(parse_config({**content, **changes}))


def test_a_federated_configuration_is_not_for_one_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="federated: this configuration is for several clients"):
        run({**SHORT, "federated": {"clients": 2, "rounds": 1, "steps": 1}}, tmp_path / "run", "sequential")
