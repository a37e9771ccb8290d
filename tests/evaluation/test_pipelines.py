"""Scoring on batches as the data layer makes them."""

import functools

import jax
import numpy as np
import pytest

from jaxcl.data.pipeline import LabelledPipeline, TextPipeline
from jaxcl.data.spec import DataConfig
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.evaluation.config import EndTaskConfig
from jaxcl.evaluation.end_tasks import score_end_task
from jaxcl.evaluation.scoring import text_loss
from jaxcl.models.network import Network
from tests.tiny.networks import llama_config, plain_params, roberta_config

SUBJECTS = ("the committee", "a member", "the bank", "our staff")
WORDS = {"hawkish": ("raises rates", "fears inflation"), "dovish": ("cuts rates", "fears unemployment")}
LENGTH = 16
SHAPE = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1}
MODELS = {"causal": llama_config(**SHAPE), "masked": roberta_config(**SHAPE)}


def rows(count: int, seed: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    labels = [list(WORDS)[int(choice)] for choice in rng.integers(0, 2, count)]
    return [{"text": f"{rng.choice(SUBJECTS)} {rng.choice(WORDS[label])}", "label": label} for label in labels]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([row["text"] for row in rows(50, 0)], SHAPE["vocab_size"])


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_loss_of_text_does_not_depend_on_the_batch_size(objective: str) -> None:
    network = Network.create(MODELS[objective])
    params = plain_params(network, 0)
    config = DataConfig(length=LENGTH, packing=False)
    losses = []
    for size in (2, 7):
        pipeline = TextPipeline(rows(9, 1), tokenizer(), config, objective=objective, batch_size=size)
        losses.append(text_loss(network, params, pipeline.once(None, 0)))
    assert losses[0].tokens == losses[1].tokens > 9
    assert losses[0].nats == pytest.approx(losses[1].nats, rel=1e-5)
    assert losses[0].correct == losses[1].correct


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_end_task_is_learned_from_text(objective: str) -> None:
    network = Network.create(MODELS[objective])
    splits = {
        name: LabelledPipeline(
            rows(count, seed),
            sorted(WORDS),
            tokenizer(),
            DataConfig(length=LENGTH),
            masked=objective == "masked",
            batch_size=8,
        )
        for name, count, seed in (("train", 64, 1), ("dev", 13, 2), ("test", 21, 3))
    }
    score = score_end_task(
        network,
        jax.tree.map(np.copy, plain_params(network, 0)),
        splits["train"],
        splits["test"],
        dev=splits["dev"],
        num_labels=2,
        config=EndTaskConfig(epochs=8, batch_size=8, learning_rate=1e-2, patience=8),
        seed=0,
    )
    assert len(score.labels) == 21
    assert score.macro_f1 > 70  # guessing gives about 50
