"""Options of federated runs, each against an oracle at the level of the run."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant

from jaxcl.config import parse_config
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.models.network import Network
from jaxcl.run import exchange
from jaxcl.run.client import Client
from jaxcl.run.federation import check_federated
from jaxcl.run.model import load_model
from jaxcl.run.server import Server
from tests.federated.helpers import DOMAINS, federated, rounds
from tests.tiny.networks import assert_equal_bits
from tests.tiny.runs import SEEKR, numbers

pytestmark = pytest.mark.optimised  # bits are compared

# Gradient descent: what follows from a step can be computed from what others do.
SGD: dict[str, Any] = {
    **DOMAINS,
    "tasks": DOMAINS["tasks"][:1],
    "optimizer": {"name": "sgd", "b1": 0.0, "learning_rate": 0.5, "schedule": "constant", "clip_norm": None},
}
LORA: dict[str, Any] = {**SGD, "model": {**SGD["model"], "lora": {"rank": 2}}}
PLAIN: dict[str, Any] = {"clients": 2, "rounds": 2, "steps": 1}


def params(folder: Path) -> Any:
    return jax.tree.map(np.asarray, load_model(str(folder)).params)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options") / "plain"
    federated(SGD, folder, "sequential", **PLAIN)
    return folder


def at_start(content: dict[str, Any]) -> Any:
    config = parse_config({**content, "output": "unused", "method": "sequential"})
    return jax.tree.map(np.asarray, jax.jit(Network.create(config.model).init)(jax.random.key(config.seed)))


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), params(one), params(other))


def test_a_proximal_term_of_zero_changes_no_bit_and_one_above_does(tmp_path: Path) -> None:
    section = {**PLAIN, "rounds": 1, "steps": 2}
    for name, changes in (
        ("none", {}),
        ("zero", {"proximal": 0.0}),
        ("some", {"proximal": 0.5}),
        ("one", {"steps": 1}),
    ):
        federated(SGD, tmp_path / name, "sequential", **{**section, **changes})
    none, some, one = (params(tmp_path / name) for name in ("none", "some", "one"))
    assert_equal_bits(params(tmp_path / "zero"), none)
    # The first step begins at the centre; the second is drawn back by rate * mu = 1/4 of the first.
    expected = jax.tree.map(lambda end, start, first: end + 0.25 * (start - first), none, at_start(SGD), one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), some, expected)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(none), strict=True))


def test_control_variates_change_nothing_until_they_are_known(plain: Path, tmp_path: Path) -> None:
    federated(SGD, tmp_path / "one", "sequential", **PLAIN, control_variates=True)
    rows, expected = (rounds(folder) for folder in (tmp_path / "one", plain))
    assert rows[0]["update_norm"] == expected[0]["update_norm"]
    # With one step per round, all clients in it and equal weights, corrections cancel in the mean, and nowhere else.
    own, plainly = (tmp_path / "one" / "clients" / "0", plain / "clients" / "0")
    assert numbers(own)[1]["update_norm"] != numbers(plainly)[1]["update_norm"]
    assert_close(tmp_path / "one", plain, 1e-6)
    assert {row["bytes_up"] for row in rounds(tmp_path / "one")} == {2 * row["bytes_up"] for row in rounds(plain)}


def test_secure_sums_are_plain_sums_to_the_fixed_point(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = exchange.Gathering.add

    def add(self: exchange.Gathering, client: int, sent: Any, weight: float) -> str | None:
        seen.append(sent)
        return original(self, client, sent, weight)

    monkeypatch.setattr(exchange.Gathering, "add", add)
    federated(SGD, tmp_path / "secure", "sequential", **PLAIN, secure=True)
    assert_close(tmp_path / "secure", plain, 2 * 2 * 2.0**-exchange.BITS)  # two clients, two rounds
    # What the server sees is uniform: bits are set half of the time, and no two messages are alike.
    words = [np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(sent)]) for sent in seen]
    assert all(one.dtype == np.uint32 for one in words)
    for one in words:
        shares = [np.mean((one >> bit) & 1) for bit in range(32)]
        np.testing.assert_allclose(shares, 0.5, atol=6 * 0.5 / math.sqrt(len(one)))
    assert not any((one == other).mean() > 0.01 for one in words for other in words if one is not other)


def test_a_secure_round_that_a_client_drops_out_of_is_lost_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Client.train

    def train(self: Client, index: int, round_number: int, *rest: Any) -> exchange.Trained:
        found = original(self, index, round_number, *rest)
        if (self.number, round_number) == (1, 0):
            return found._replace(params=jax.tree.map(lambda leaf: leaf * np.float32(1e6), found.params))
        return found

    monkeypatch.setattr(Client, "train", train)
    federated(SGD, tmp_path, "sequential", **PLAIN, secure=True)
    first, second = rounds(tmp_path)
    assert first["lost"].startswith("clients 1 dropped out")
    assert "is not below" in first["refused"]["1"]
    assert first["update_norm"] == 0
    assert "lost" not in second
    assert second["update_norm"] > 0


@pytest.mark.parametrize("secure", [False, True])
def test_private_rounds_are_clipped_noised_and_accounted(
    secure: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    means: list[Any] = []
    original = Server._take

    def take(self: Server, *rest: Any) -> str | None:
        before = self.params
        found = original(self, *rest)
        means.append(jax.tree.map(np.subtract, self.params, before))
        return found

    monkeypatch.setattr(Server, "_take", take)
    section = {**PLAIN, "clients": 3, "participation": 0.6, "rounds": 3, "secure": secure}
    clip, delta = 1e-3, 1e-3
    privacy = {"clip": clip, "noise_multiplier": 0.0, "delta": delta}
    silent = federated(SGD, tmp_path / "silent", "sequential", **section, privacy=privacy)
    norms = [math.sqrt(sum(float(np.sum(leaf**2)) for leaf in jax.tree.leaves(mean))) for mean in means]
    assert all(0 < norm <= clip * 1.001 for norm in norms)
    assert silent.extra["federated"]["epsilon"]["0"] is None or math.isinf(silent.extra["federated"]["epsilon"]["0"])
    means.clear()
    noised = federated(
        SGD, tmp_path / "noised", "sequential", **section, privacy={**privacy, "noise_multiplier": 200.0}
    )
    for mean in means:
        drawn = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(mean)])
        assert abs(drawn.std() / (200 * clip / 2) - 1) < 6 / math.sqrt(2 * len(drawn))  # two clients in a round
    found = noised.extra["federated"]
    taken = {name: sum(name in row["clients"] for row in rounds(tmp_path / "noised")) for name in "012"}
    assert len(set(taken.values())) > 1
    for name, times in taken.items():
        event = dp_event.SelfComposedDpEvent(dp_event.GaussianDpEvent(200.0), times)
        expected = RdpAccountant().compose(event).get_epsilon(delta) if times else 0.0
        assert found["epsilon"][name] == pytest.approx(expected)


def test_a_client_that_did_not_clip_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = exchange.clip_update

    def unclipped(update: Any, limit: float) -> Any:
        return original(update, 10 * limit)

    monkeypatch.setattr(exchange, "clip_update", unclipped)
    privacy = {"clip": 1e-4, "noise_multiplier": 0.0}
    federated(SGD, tmp_path, "sequential", **{**PLAIN, "rounds": 1}, privacy=privacy)
    assert {name: "is over the limit 0.0001" in why for name, why in rounds(tmp_path)[0]["refused"].items()} == {
        "0": True,
        "1": True,
    }


def test_only_the_second_factor_of_adapters_is_trained_and_travels(tmp_path: Path) -> None:
    section = {**PLAIN, "rounds": 1, "steps": 2}
    federated({**LORA, "optimizer": {"name": "adamw", "weight_decay": 0.1}}, tmp_path / "b", "sequential", **section)
    federated(LORA, tmp_path / "both", "sequential", **section, share="params")
    b, both = params(tmp_path / "b"), params(tmp_path / "both")
    flat = {name: dict(jax.tree_util.tree_flatten_with_path(tree)[0]) for name, tree in (("b", b), ("both", both))}
    first = [path for path in flat["b"] if "lora_a" in jax.tree_util.keystr(path)]
    second = [path for path in flat["b"] if "lora_b" in jax.tree_util.keystr(path)]
    assert first
    assert all((flat["b"][path] != 0).any() for path in second)
    assert any((flat["b"][path] != flat["both"][path]).any() for path in first)  # trained in the other one
    assert rounds(tmp_path / "b")[0]["bytes_up"] == 2 * 4 * sum(flat["b"][path].size for path in second)
    assert rounds(tmp_path / "both")[0]["bytes_up"] == 2 * 4 * sum(flat["b"][path].size for path in [*first, *second])
    untouched = dict(jax.tree_util.tree_flatten_with_path(at_start(LORA))[0])
    for path in first:
        np.testing.assert_array_equal(flat["b"][path], untouched[path])


def test_clients_with_folders_of_their_own_learn_from_them(tmp_path: Path) -> None:
    def write(folder: Path, words: str, count: int) -> None:
        folder.mkdir(parents=True)
        rows = [{"prompt": f"{words} {index}?", "answer": words} for index in range(count)]
        (folder / "train.json").write_text(json.dumps(rows))
        for split in ("eval", "test"):
            (folder / f"{split}.json").write_text(json.dumps(rows[:4]))

    for name, words, count in (("", "both", 8), ("north", "snow", 24), ("south", "sand", 16)):
        write(tmp_path / "data" / name / "greetings", words, count)
    content = {
        **SGD,
        "model": {**SGD["model"], "max_length": 96},
        "data": {"prompt_length": 32, "answer_length": 16, "buckets": 1},
        "data_root": str(tmp_path / "data"),
        "tasks": [{"name": "greetings", "source": "json:greetings", "kind": "pairs"}],
        "evaluation": {"batch_size": 4, "max_new_tokens": 4},
    }
    owners = ["north", str(tmp_path / "data/south")]
    found = federated(content, tmp_path / "run", "sequential", **PLAIN, owners=owners, score_clients=True)
    # Each client scores the last model on its own test rows; 4 tokens are no answer, so that all scores are 0.
    scores = found.extra["federated"]["scores"]
    assert scores == {"0": [[0.0]], "1": [[0.0]]}
    asked = [
        json.loads((tmp_path / "run/clients" / name / "predictions/after00_task00.jsonl").read_text().splitlines()[0])
        for name in "01"
    ]
    assert ["snow" in json.dumps(asked[0]), "sand" in json.dumps(asked[1])] == [True, True]
    clients = found.data["greetings"]["clients"]
    assert {name: one["examples"] for name, one in clients.items()} == {"0": 24, "1": 16}
    assert found.data["greetings"]["task"]["examples"] == 8
    with pytest.raises(UserError, match=r"nowhere"):
        federated(content, tmp_path / "other", "sequential", **PLAIN, owners=["north", "nowhere"])


def test_every_step_of_every_client_equals_one_on_the_joined_batch(tmp_path: Path) -> None:
    """Clients with equal numbers of equally long rows: their batches together are one of twice the size."""
    rows = [{"prompt": "word", "answer": letter * 8} for letter in "abcdefghijklmnop"]
    folder = tmp_path / "data" / "letters"
    folder.mkdir(parents=True)
    (folder / "train.json").write_text(json.dumps(rows))
    for split in ("eval", "test"):
        (folder / f"{split}.json").write_text(json.dumps(rows[:4]))
    content = {
        **SGD,
        "model": {**SGD["model"], "max_length": 96},
        "data": {"prompt_length": 32, "answer_length": 32, "buckets": 1},
        "data_root": str(tmp_path / "data"),
        "tasks": [{"name": "letters", "source": "json:letters", "kind": "pairs"}],
        "evaluation": {"batch_size": 4, "max_new_tokens": 12},
        "tokenizer": {"vocab_size": 262},
    }
    results: list[Results] = []
    for name, clients, size in (("two", 2, 8), ("one", 1, 16)):
        # Two clients with eight rows see all sixteen in a step, as one with sixteen does.
        training = {**content["training"], "batch_size": size}
        section = {"clients": clients, "rounds": 3, "steps": 1}
        results.append(federated({**content, "training": training}, tmp_path / name, "sequential", **section))
    assert_close(tmp_path / "two", tmp_path / "one", 1e-6)
    assert max(row["update_norm"] for row in rounds(tmp_path / "one")) > 1e-3


REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "noise and Fisher": ({"privacy": {"clip": 1, "noise_multiplier": 1}}, "ewc", "federated.privacy: ewc shares"),
    "masks and importance": ({"secure": True}, SEEKR, "federated.secure: seekr shares"),
    "no adapters": ({"share": "adapters"}, "sequential", "federated.share: adapters, but the model has none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_fit_the_rest_are_refused(name: str) -> None:
    options, method, words = REFUSED[name]
    content = {**SGD, "output": "unused", "method": method, "federated": {**PLAIN, **options}}
    with pytest.raises(UserError, match=words):
        check_federated(parse_config(content))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"secure": True, "participation": 0.5}, "at least 2 clients in a round"),
        ({"owners": ["a"]}, "expected a folder for each of 2 clients, got 1"),
        ({"owners": ["a", "b"], "alpha": 1.0}, "with owners each has its own"),
        ({"control_variates": True, "privacy": {"clip": 1.0, "noise_multiplier": 1.0}}, "no noise hides them"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_config({**SGD, "output": "unused", "method": "sequential", "federated": {**PLAIN, **options}})
