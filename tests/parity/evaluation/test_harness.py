"""The language-model evaluation harness itself drives a jaxcl model through small local tasks."""

import importlib.util
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.data.tokenizer import Tokenizer
from jaxcl.evaluation.harness import HarnessModel
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network

pytestmark = [
    pytest.mark.optimised,  # as jaxcl computes for its users
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'jaxcl[eval]'"
    ),
    # Of the harness and the packages it imports.
    pytest.mark.filterwarnings("ignore"),
]

ROWS = [
    {"question": "Is the sky blue?", "choices": ["yes", "no"], "answer": 0},
    {"question": "Is fire cold?", "choices": ["yes", "no, it is hot"], "answer": 1},
    {"question": "Name a colour", "choices": ["table", "green", "seven"], "answer": 1},
    {"question": "Two and two?", "choices": ["four", "five", "three", "nine"], "answer": 0},
    {"question": "Capital of France?", "choices": ["Rome", "Paris"], "answer": 1},
]
TOKENIZER = Tokenizer.train([row["question"] + " " + " ".join(row["choices"]) for row in ROWS] * 3, 300)
NETWORK = Network.create(
    LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, max_length=128)
)


def model() -> HarnessModel:
    params = NETWORK.init(jax.random.key(0))
    return HarnessModel(NETWORK, jax.tree.map(lambda leaf: leaf * 8, params), TOKENIZER, batch_size=4)


def splits(**_: Any) -> Any:
    import datasets

    return {"test": datasets.Dataset.from_list(ROWS)}


COMMON: dict[str, Any] = {"custom_dataset": splits, "test_split": "test", "num_fewshot": 0}
CHOICES = COMMON | {
    "task": "tiny_choices",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}
TEXTS = COMMON | {
    "task": "tiny_texts",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "byte_perplexity"}],
}
WRITING = COMMON | {
    "task": "tiny_writing",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
    "metric_list": [{"metric": "exact_match"}],
}


def test_the_harness_drives_all_three_kinds_of_request() -> None:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    harness = model()
    assert isinstance(harness, LM)
    found = lm_eval.simple_evaluate(
        harness,
        tasks=[CHOICES, TEXTS, WRITING],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    results = found["results"]

    class Request:
        def __init__(self, *args: Any) -> None:
            self.args = args

    right = []
    for row in ROWS:
        asked = [Request(f"Question: {row['question']}\nAnswer:", f" {choice}") for choice in row["choices"]]
        nats = [nats for nats, _ in harness.loglikelihood(asked)]
        right.append(int(np.argmax(nats)) == row["answer"])
    assert results["tiny_choices"]["acc,none"] == pytest.approx(np.mean(right))
    assert 0 < sum(right) < len(ROWS)

    nats = sum(harness.loglikelihood_rolling([Request(row["question"]) for row in ROWS]))
    size = sum(len(row["question"].encode()) for row in ROWS)
    assert results["tiny_texts"]["byte_perplexity,none"] == pytest.approx(np.exp(-nats / size))

    written = harness.generate_until([Request(row["question"], WRITING["generation_kwargs"]) for row in ROWS])
    logged = sorted(found["samples"]["tiny_writing"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in logged] == written
