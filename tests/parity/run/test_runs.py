"""Whole runs against transformers and torch: what is exported, what is packed, what accumulation learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxcl.commands.convert import convert
from jaxcl.commands.generate import generate_text
from jaxcl.config import parse_config
from jaxcl.data.pairs import encode_prompts
from jaxcl.data.pipeline import TextPipeline
from jaxcl.data.spec import DataConfig
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.evaluation.scoring import text_loss
from jaxcl.models.llama import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.run import load_model, sequence
from jaxcl.weights import load_weights, named, save_hf
from tests.parity.weights.both_sides import random_params
from tests.tiny.runs import DECODER, TOKENIZER

pytestmark = pytest.mark.optimised  # as jaxcl computes for its users

NEW = 8
DATA = {"prompt_length": 32, "answer_length": 16, "buckets": 1}
TEXTS = ("one short text", "another text that is a little longer than that", "x", "numbers 1 2 3 4 5 6 7 8 9", "last")


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.mkdir(parents=True)
    for split in ("train", "test"):
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{path}"


# ---------------------------------------------------------------- what is exported


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with a tokenizer of its own that has begun to learn answers of one digit and where they end."""
    root = tmp_path_factory.mktemp("trained")
    source = write(root / "data", [{"prompt": f"number {i}:", "answer": str(i % 3)} for i in range(24)])
    content = {
        "model": {**DECODER, "init_std": 0.1},
        "tokenizer": TOKENIZER,
        "data": DATA,
        "tasks": [{"name": "digits", "source": source}],
        "training": {"batch_size": 8, "steps": 60, "log_every": 60, "checkpoint_every": 0},
        "optimizer": {"learning_rate": 1e-2},
        "evaluation": {"batch_size": 8, "max_new_tokens": NEW},
        "method": "sequential",
        "output": str(root / "run"),
    }
    sequence.run(parse_config(content))
    return root / "run"


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_transformers_frames_and_answers_prompts_as_the_run_does(trained: Path, format: str, tmp_path: Path) -> None:
    exported = convert(str(trained), tmp_path / format, format, "float32")
    if format == "orbax":  # converted once more
        exported = convert(str(exported), tmp_path / "hf", "hf", "float32")
    theirs, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    own = Tokenizer.load(trained / "tokenizer")
    ends = json.loads((exported / "generation_config.json").read_text())["eos_token_id"]
    assert (ends if isinstance(ends, list) else [ends]) == list(own.end_ids)
    lengths, answers = set(), set()
    for prompt in ("number 1:", "number 17:", "other words, Grüße", "12"):
        ids = theirs(prompt).input_ids
        assert ids == encode_prompts([prompt], own, DataConfig(**DATA)).ids[0]
        written = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0][len(ids) :].tolist()
        text = theirs.decode(written, skip_special_tokens=True).strip()
        options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0.0, "top_p": 1.0, "seed": 0, "raw": False}
        assert text == generate_text(str(trained), prompt, **options)
        lengths.add(len(written))
        answers.add(text)
    assert min(lengths) < NEW, "no answer ended, so nothing shows where answers end"
    assert any(answers)


# ---------------------------------------------------------------- what is learned


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder and a tokenizer as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "max_length": 256}
    network = Network.create(LlamaConfig(vocab_size=300, **sizes))
    save_hf(folder, network, random_params(network))
    Tokenizer.train([*TEXTS, "p a b c d e f"] * 3, 290).save(folder)
    return folder


def test_packed_texts_have_the_loss_of_each_text_alone(wide: Path) -> None:
    tokenizer, model = Tokenizer.load(wide), AutoModelForCausalLM.from_pretrained(wide)
    network, params = load_weights(wide)
    rows = [{"text": text} for text in TEXTS]
    packed = TextPipeline(rows, tokenizer, DataConfig(length=128), objective="causal", batch_size=2)
    found = text_loss(network, params, packed.once())
    assert len(packed.sources[0]) < len(TEXTS)
    nats, tokens = 0.0, 0
    for text in TEXTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits.log_softmax(-1)[0, :-1]
        nats -= scores[range(len(ids) - 1), ids[1:]].sum().item()
        tokens += len(ids) - 1
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.tokens == tokens


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_is_that_of_the_mean_over_all_answer_tokens(wide: Path, accumulate: int, tmp_path: Path) -> None:
    """Rows of uneven length; with micro-batches, some of which hold fewer tokens than others."""
    rows = [{"prompt": "p" * (1 + 3 * i), "answer": "a b c d e f"[: 1 + i * 2]} for i in range(6)]
    tokenizer, model = Tokenizer.load(wide), AutoModelForCausalLM.from_pretrained(wide)
    total, count = torch.zeros(()), 0
    for row in rows:
        prompt = [tokenizer.bos_id, *tokenizer.encode(row["prompt"])]
        answer = [*tokenizer.encode(" " + row["answer"].strip()), tokenizer.eos_id]
        scores = model(torch.tensor([prompt + answer])).logits.log_softmax(-1)[0]
        total = total - scores[range(len(prompt) - 1, len(prompt) + len(answer) - 1), answer].sum()
        count += len(answer)
    (total / count).backward()
    rate = 0.01
    expected = {name: (one - rate * one.grad).detach().numpy() for name, one in model.named_parameters()}
    content = {
        "weights": str(wide),
        "data": DATA,
        "tasks": [{"name": "a", "source": write(tmp_path / "data", rows)}],
        "training": {"batch_size": 8, "accumulate": accumulate, "steps": 1, "log_every": 1, "checkpoint_every": 0},
        "optimizer": {"name": "sgd", "b1": 0.0, "learning_rate": rate, "schedule": "constant", "clip_norm": None},
        "evaluation": {"batch_size": 8, "max_new_tokens": 16},
        "method": "sequential",
        "output": str(tmp_path / "run"),
    }
    sequence.run(parse_config(content))
    model_of_run = load_model(str(tmp_path / "run"))
    network, params = model_of_run.network, model_of_run.params
    found = named(network, params)
    assert found.keys() == expected.keys()
    moved = {name: expected[name] - one for name, one in load_tensors(wide).items()}
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.abs(moved[name]).max() > 1e-4, name


def load_tensors(folder: Path) -> dict[str, np.ndarray]:
    network, params = load_weights(folder)
    return {name: np.asarray(one) for name, one in named(network, params).items()}
