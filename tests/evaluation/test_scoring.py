import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.evaluation.scoring import TextLoss, drawn, score_pairs, text_loss
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network
from tests.tiny.networks import llama_config, plain_params, roberta_config

ROWS = [
    {"prompt": "a long prompt of many words", "answer": "yes"},
    {"prompt": "short", "answer": "no"},
    {"prompt": "a middle one", "answer": "Yes."},
]

LLAMA = llama_config(num_layers=1)
ROBERTA = roberta_config(num_layers=1)


def test_pairs_are_answered_in_batches_of_similar_length_and_kept_in_order() -> None:
    calls: list[list[str]] = []
    done: list[int] = []

    def generate(prompts: list[str]) -> list[str]:
        calls.append(prompts)
        return ["no" if prompt == "short" else "yes" for prompt in prompts]

    scored = score_pairs(ROWS, generate, "exact_match", batch_size=2, progress=done.append)
    assert calls == [["short", "a middle one"], ["a long prompt of many words"]]
    assert done == [2, 1]
    assert scored.score == 100
    assert [row["prompt"] for row in scored.rows] == [row["prompt"] for row in ROWS]
    assert scored.rows[1] == {"prompt": "short", "prediction": "no", "answer": "no", "score": 100.0, "correct": True}
    strict = score_pairs(ROWS, generate, "accuracy", batch_size=3)
    assert strict.score == pytest.approx(200 / 3)
    assert [row["correct"] for row in strict.rows] == [True, True, False]


def test_rewriting_is_scored_against_the_source_or_the_prompt() -> None:
    rows = [{"prompt": "Simplify: the feline sat", "source": "the feline sat", "answer": "the cat sat"}]
    copied = score_pairs(rows, lambda prompts: ["the feline sat"], "sari", batch_size=1).score
    assert score_pairs(rows[:1], lambda prompts: ["the cat sat"], "sari", batch_size=1).score == 100
    without = [{"prompt": rows[0]["prompt"], "answer": rows[0]["answer"]}]
    # Against the whole prompt, dropping "Simplify:" counts as right deletions.
    assert score_pairs(without, lambda prompts: ["the feline sat"], "sari", batch_size=1).score > copied


def test_a_limit_draws_the_same_examples_every_time() -> None:
    rows = [{"prompt": str(number), "answer": "x"} for number in range(50)]
    seen = [
        row["prompt"] for row in score_pairs(rows, lambda p: ["x"] * len(p), "accuracy", batch_size=8, limit=10).rows
    ]
    assert seen == [str(index) for index in drawn(50, 10)]
    assert len(set(seen)) == 10
    assert seen != [str(number) for number in range(10)]


def test_wrong_generators_and_empty_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 answers, got 1"):
        score_pairs(ROWS, lambda prompts: ["x"], "accuracy", batch_size=2)
    with pytest.raises(ValueError, match="at least one example"):
        score_pairs([], lambda prompts: [], "accuracy", batch_size=2)


def rows_of(network: Network, lengths: list[int], *, predict: bool, seed: int) -> list[dict[str, Any]]:
    """Rows of one document each, as batches of two; weights mark real targets."""
    rng = np.random.default_rng(seed)
    width = 6
    batches = []
    for start in range(0, len(lengths), 2):
        part = lengths[start : start + 2]
        part += [0] * (2 - len(part))
        segments = np.array([[int(place < length) for place in range(width)] for length in part], np.int32)
        batch: dict[str, Any] = {
            "tokens": rng.integers(2, 13, (2, width)).astype(np.int32),
            "segments": segments,
            "positions": np.tile(np.arange(width, dtype=np.int32), (2, 1)) * segments,
            "predict": None,
            "targets": rng.integers(2, 13, (2, width)).astype(np.int32),
            "weights": segments.astype(np.float32),
            "task": np.zeros(2, np.int32),
            "example": np.zeros(2, np.int32),
        }
        if predict:
            batch["predict"] = np.array([[0, 2, 1]] * 2, np.int32)
            batch["targets"] = batch["targets"][:, :3]
            batch["weights"] = np.array([[1, length > 2, 0] if length else [0, 0, 0] for length in part], np.float32)
        batches.append(batch)
    return batches


@pytest.mark.parametrize(("config", "predict"), [(LLAMA, False), (LLAMA, True), (ROBERTA, True)])
def test_text_loss_equals_log_probabilities_row_by_row(config: Any, predict: bool) -> None:
    network = Network.create(config)
    params = plain_params(network, 0)
    batches = rows_of(network, [6, 3, 1], predict=predict, seed=3)

    forward = jax.jit(lambda params, batch: network.logits(params, network.hidden(params, batch).states))
    nats, correct, count = 0.0, 0, 0
    for fields in batches:
        batch = Batch(**fields)
        logits = np.asarray(forward(params, batch), np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for row in range(2):
            places = range(6) if fields["predict"] is None else fields["predict"][row]
            for column, place in enumerate(places):
                if fields["weights"][row, column]:
                    target = fields["targets"][row, column]
                    nats -= log_probs[row, place, target]
                    correct += int(log_probs[row, place].argmax() == target)
                    count += 1

    measured = text_loss(network, params, batches)
    assert measured.tokens == count
    assert measured.correct == correct
    assert measured.nats == pytest.approx(nats, rel=1e-5)
    assert measured.metric("perplexity") == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert measured.metric("token_accuracy") == pytest.approx(100 * correct / count)


def test_text_loss_is_exact_over_uneven_batches_and_compiles_once() -> None:
    network = Network.create(LLAMA)
    params = plain_params(network, 1)
    batches = rows_of(network, [6, 6, 1, 2], predict=False, seed=5)
    parts = [text_loss(network, params, [batch]) for batch in batches]
    whole = text_loss(network, params, batches)
    assert whole.nats == pytest.approx(sum(part.nats for part in parts))
    assert whole.loss != pytest.approx(np.mean([part.loss for part in parts]), rel=1e-3)

    compiled: list[Any] = []

    def compile(function: Any) -> Any:
        compiled.append(jax.jit(function))
        return compiled[-1]

    for _ in range(2):
        assert text_loss(network, params, batches, compile=compile, place=lambda f: Batch(**f)).nats == whole.nats
    assert len(compiled) == 1
    assert compiled[0]._cache_size() == 1


def test_dropout_is_off() -> None:
    dry = Network.create(ROBERTA)
    wet = Network.create(ROBERTA.model_copy(update={"hidden_dropout": 0.9}))
    params = plain_params(dry, 0)
    batches = rows_of(dry, [6, 4], predict=True, seed=0)
    assert text_loss(wet, params, batches).nats == text_loss(dry, params, batches).nats


def test_nothing_to_predict_is_refused() -> None:
    network = Network.create(LLAMA)
    (batch,) = rows_of(network, [6, 3], predict=False, seed=0)
    batch["weights"][:] = 0
    with pytest.raises(ValueError, match="at least one predicted token"):
        text_loss(network, plain_params(network, 0), [batch])
    with pytest.raises(ValueError, match="at least one predicted token"):
        text_loss(network, plain_params(network, 0), [])


def test_perplexity_of_an_absurd_loss_is_infinite_not_an_error() -> None:
    assert dataclasses.replace(TextLoss(1.0, 0.0, 1.0), nats=1e6).perplexity == math.inf
