from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.evaluation import end_tasks
from jaxcl.evaluation.config import EndTaskConfig
from jaxcl.evaluation.end_tasks import EndTaskScore, class_scores, score_end_task, with_body, with_labels
from jaxcl.evaluation.scoring import as_batch
from jaxcl.models.network import Network
from tests.tiny.networks import llama_config, plain_params, roberta_config

BATCH, LENGTH = 8, 6
SIZES = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1}
LLAMA = llama_config(**SIZES, init_std=0.02)
ROBERTA = roberta_config(**SIZES, init_std=0.02, max_length=LENGTH, hidden_dropout=0.1, attention_dropout=0.1)
CONFIG = EndTaskConfig(epochs=6, batch_size=BATCH, learning_rate=1e-2, patience=6, length=8)


class Rows:
    """Rows whose class is the token that stands everywhere but at the ends; the last batch is filled up."""

    def __init__(self, count: int, seed: int, *, random_labels: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, 3, count).astype(np.int32)
        shown = rng.integers(0, 3, count) if random_labels else self.labels
        self.tokens = np.full((count, LENGTH), 1, np.int32)
        self.tokens[:, 1:-1] = 5 + shown[:, None]
        self.lengths = rng.integers(4, LENGTH + 1, count)
        self.steps_per_epoch = -(-count // BATCH)
        self.seen: list[list[int]] = []

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        real = np.concatenate([np.ones(len(indices)), np.zeros(BATCH - len(indices))])
        indices = np.concatenate([indices, np.zeros(BATCH - len(indices), np.int64)])
        segments = (np.arange(LENGTH) < self.lengths[indices][:, None]) * real[:, None]
        return {
            "tokens": self.tokens[indices],
            "segments": segments.astype(np.int32),
            "positions": (np.arange(LENGTH) * segments).astype(np.int32),
            "predict": np.zeros((BATCH, 1), np.int32),
            "targets": np.zeros((BATCH, 1), np.int32),
            "weights": real[:, None].astype(np.float32),
            "task": np.zeros(BATCH, np.int32),
            "example": indices.astype(np.int32),
            # A filler's class must never count: give it one that does not occur.
            "labels": np.where(real > 0, self.labels[indices], 2**20).astype(np.int32),
        }

    def batch_at(self, step: int, *, seed: int) -> dict[str, Any]:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(self.labels))
        self.seen.append(order[place * BATCH : (place + 1) * BATCH].tolist())
        return self.batch(order[place * BATCH : (place + 1) * BATCH])

    def once(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.labels), BATCH):
            yield self.batch(np.arange(start, min(start + BATCH, len(self.labels))))


@pytest.mark.parametrize("config", [LLAMA, pytest.param(ROBERTA, marks=pytest.mark.slow)])
def test_learns_a_learnable_task_and_leaves_the_model_alone(config: Any) -> None:
    network = Network.create(config)
    params = plain_params(network, 0)
    before = jax.tree.map(np.asarray, params)
    train, test = Rows(44, 0), Rows(21, 1)
    score = score_end_task(network, params, train, test, dev=Rows(13, 2), num_labels=3, config=CONFIG, seed=0)
    assert score.accuracy == 100
    assert score.macro_f1 == score.micro_f1 == 100
    np.testing.assert_array_equal(score.predictions, test.labels)  # the fillers of the last batch are gone
    jax.tree.map(np.testing.assert_array_equal, params, before)
    epoch = sorted(index for batch in train.seen[: train.steps_per_epoch] for index in batch)
    assert epoch == list(range(44))


def test_stops_when_dev_stops_improving_and_keeps_the_best() -> None:
    network = Network.create(LLAMA)
    params = plain_params(network, 0)
    train = Rows(40, 0, random_labels=True)
    config = CONFIG.model_copy(update={"epochs": 40, "patience": 2})
    dev = Rows(9, 3, random_labels=True)
    score = score_end_task(network, params, train, dev, dev=dev, num_labels=3, config=config, seed=0)
    assert score.runs[0]["epochs"] < 40
    assert len(train.seen) == score.runs[0]["epochs"] * train.steps_per_epoch
    assert score.macro_f1 == score.runs[0]["dev"]  # scored on dev: the params of the best epoch


@pytest.mark.parametrize(("metric", "epochs", "best"), [("micro_f1", 4, 9.0), ("macro_f1", 6, 6.0)])
def test_stops_by_the_metric_it_is_told(metric: str, epochs: int, best: float, monkeypatch: pytest.MonkeyPatch) -> None:
    dev_scores = [(1.0, 8.0), (2.0, 9.0), (3.0, 7.0), (4.0, 8.0), (5.0, 1.0), (6.0, 2.0)]  # macro, micro
    scripted = iter([*dev_scores[:epochs], (0.0, 0.0)])  # the test rows come last

    def scores(*_: Any) -> dict[str, float]:
        macro, micro = next(scripted)
        return {"macro_f1": macro, "micro_f1": micro, "accuracy": 0.0}

    monkeypatch.setattr(end_tasks, "class_scores", scores)
    network = Network.create(LLAMA)
    config = CONFIG.model_copy(update={"epochs": 6, "patience": 2})
    train, dev = Rows(8, 0), Rows(9, 3)
    params = plain_params(network, 0)
    found = score_end_task(network, params, train, dev, dev=dev, num_labels=3, metric=metric, config=config, seed=0)
    assert (found.runs[0]["epochs"], found.runs[0]["dev"]) == (epochs, best)
    assert next(scripted, None) is None


def test_without_dev_rows_all_epochs_run() -> None:
    network = Network.create(LLAMA)
    train = Rows(16, 0)
    score = score_end_task(
        network, plain_params(network, 0), train, train, dev=None, num_labels=3, config=CONFIG, seed=0
    )
    assert len(train.seen) == CONFIG.epochs * train.steps_per_epoch
    assert np.isnan(score.runs[0]["dev"])


def test_repetitions_differ_and_are_averaged() -> None:
    network = Network.create(LLAMA)
    config = CONFIG.model_copy(update={"seeds": 2, "epochs": 1})
    rows = Rows(24, 0, random_labels=True)
    score = score_end_task(
        network, plain_params(network, 0), rows, Rows(50, 1), dev=None, num_labels=3, config=config, seed=5
    )
    assert len(score.runs) == 2
    assert score.macro_f1 == pytest.approx(np.mean([run["macro_f1"] for run in score.runs]))
    half = len(rows.seen) // 2
    assert rows.seen[:half] != rows.seen[half:]
    again = score_end_task(
        network, plain_params(network, 0), rows, Rows(50, 1), dev=None, num_labels=3, config=config, seed=5
    )
    assert again.runs == score.runs or str(again.runs) == str(score.runs)  # NaN where there is no dev score


def test_filler_rows_change_nothing_and_programs_are_shared() -> None:
    """A short last batch gives the gradient of its real rows: the filler's class would otherwise break the loss."""
    network = Network.create(LLAMA)
    params = plain_params(network, 0)
    compiled: list[Any] = []

    def compile(function: Any) -> Any:
        compiled.append(jax.jit(function))
        return compiled[-1]

    for _ in range(2):
        score = score_end_task(
            network, params, Rows(3, 0), Rows(3, 0), dev=None, num_labels=3, config=CONFIG, seed=0, compile=compile
        )
        assert score.accuracy == 100
    assert len(compiled) == 3
    assert [function._cache_size() for function in compiled] == [1, 1, 1]


def test_the_body_is_copied_and_the_head_is_fresh() -> None:
    for config in (LLAMA, ROBERTA):
        network = Network.create(config)
        params = plain_params(network, 0)
        classifier = with_labels(network, 3)
        fresh = plain_params(classifier, 1)
        body = with_body(fresh, params)
        assert set(body) == {*params, "classifier"}
        for name in params:
            assert body[name] is params[name]
        assert body["classifier"] is fresh["classifier"]
        # A model that already is a classifier gives its body only.
        np.testing.assert_array_equal(
            with_body(fresh, plain_params(classifier, 2))["classifier"]["out"]["kernel"],
            fresh["classifier"]["out"]["kernel"],
        )
    other = plain_params(Network.create(LLAMA.model_copy(update={"hidden_size": 8})), 0)
    with pytest.raises(ValueError, match="network"):
        with_body(plain_params(with_labels(Network.create(LLAMA), 3), 1), other)


def test_learning_rate_rises_then_falls_in_a_line() -> None:
    config = EndTaskConfig(learning_rate=1.0, warmup=0.5)
    rates = [float(end_tasks.learning_rate(config, step, 8)) for step in range(8)]
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25])
    assert float(end_tasks.learning_rate(EndTaskConfig(learning_rate=2.0, warmup=0.0), 0, 1)) == 2


def test_decay_spares_biases_and_scales() -> None:
    optimizer = end_tasks._optimizer(EndTaskConfig(weight_decay=0.5, clip=1e9))
    params = {name: np.full(1, 4, np.float32) for name in ("kernel", "embedding", "bias", "scale")}
    grads = {name: np.ones(1, np.float32) for name in params}
    direction, _ = optimizer.update(grads, optimizer.init(params), params)
    # Adam's first step has size 1; decay adds half the weight.
    expected = {"kernel": 3.0, "embedding": 3.0, "bias": 1.0, "scale": 1.0}
    assert {name: float(value[0]) for name, value in direction.items()} == pytest.approx(expected, rel=1e-5)


def test_class_scores_of_a_case_computed_by_hand() -> None:
    scores = class_scores(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1]))
    # Class 0: P 1/2, R 1, F1 2/3. Class 1: P 1, R 1/3, F1 1/2. Class 2, which was given and is not there: 0.
    assert scores["macro_f1"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    assert scores["micro_f1"] == scores["accuracy"] == 50


def test_deviation_of_the_repetitions() -> None:
    runs = [{"accuracy": 60.0}, {"accuracy": 70.0}, {"accuracy": 80.0}]
    none = np.zeros(0, np.int32)
    score = EndTaskScore(0.0, 0.0, 70.0, runs, none, none, 0.0)
    assert score.deviation("accuracy") == 10.0  # (100 + 0 + 100) / 2
    assert EndTaskScore(0.0, 0.0, 60.0, runs[:1], none, none, 0.0).deviation("accuracy") is None


@pytest.mark.slow
def test_a_model_held_in_bfloat16_is_tuned_in_float32() -> None:
    """At a rate of 1e-5 hardly a weight would move in bfloat16."""
    held = LLAMA.model_copy(update={"compute": LLAMA.compute.model_copy(update={"param_dtype": "bfloat16"})})
    network = Network.create(held)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), plain_params(network, 0))
    config = CONFIG.model_copy(update={"learning_rate": 1e-5, "warmup": 0.0})
    programs = end_tasks._programs(with_labels(network, 3), config, jax.jit)
    before = programs.start(params, jax.random.key(0), jnp.int32(100))
    after = programs.train(before, as_batch(Rows(8, 0).batch_at(0, seed=0)), jax.random.key(1))
    for state in (before, after):
        floats = [leaf.dtype for leaf in jax.tree.leaves((state.params, state.moments)) if leaf.ndim]
        assert set(floats) == {jnp.dtype("float32")}
    moved = jax.tree.map(lambda a, b: float((a != b).mean()), before.params["blocks"], after.params["blocks"])
    assert min(jax.tree.leaves(moved)) > 0.9
