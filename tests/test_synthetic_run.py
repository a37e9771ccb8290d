"""Runs that remember what the model wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.config import parse_config
from jaxcl.data.synthetic import Frame, Sample
from jaxcl.data.teacher_store import TeacherStore
from jaxcl.errors import UserError
from jaxcl.methods.options import SyntheticConfig
from jaxcl.models.batch import Batch
from jaxcl.run import consolidation
from jaxcl.run.components import build, initial_params
from jaxcl.run.folder import RunFolder
from jaxcl.run.synthesis import Writer
from jaxcl.weights import load_weights, save_hf
from tests.tiny.runs import PAIRS, SEEKR, TEXT, numbers, run

WRITTEN: dict[str, Any] = {
    **SEEKR,
    "replay": {"fraction": 0.25, "source": "synthetic", "synthetic": {"candidates": 2, "writer": "before"}},
}
BODIES = ["RED ALPHA", "GREEN BETA", "BLUE GAMMA", "WHITE DELTA", "GREY EPSILON", "PINK ZETA", "TEAL ETA", "RUST THETA"]


class Given(Writer):
    """A model this small ends neither a prompt nor an answer: here are bodies of prompts, with one answer to all."""

    def bodies(self, frame: Frame, settings: SyntheticConfig, count: int, key: Any) -> list[str | None]:
        return [*BODIES, None][:count]

    def samples(self, frame: Frame, bodies: list[str | None]) -> list[Sample]:
        return [Sample(body, "L", -float(place)) for place, body in enumerate(bodies)]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consolidation, "Writer", Given)


@pytest.mark.usefixtures("given")
def test_a_run_keeps_written_samples_with_their_signals_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "written"
    results = run(PAIRS, folder, WRITTEN)
    assert results.finished
    memory = json.loads((folder / "memory.json").read_text())
    parts = build(parse_config({**PAIRS, "output": str(folder), "method": WRITTEN}), RunFolder(folder))
    first = memory["tasks"][0]
    assert first["synthetic"]
    written = [json.loads(line) for line in (folder / "memory/task00.jsonl").read_text().splitlines()]
    assert first["examples"] == list(range(len(written)))
    assert 0 < len(written) <= 8
    prompts = {str(row["prompt"]) for row in parts.tasks[0].train}
    for row in written:
        assert row["prompt"] not in prompts
        assert any(body in row["prompt"] for body in BODIES)
    store = TeacherStore.open(sorted((folder / "teacher").glob("task00*")))
    assert sorted(store.keys) == list(range(len(written)))
    rows = numbers(folder)
    assert any(row["task"] == 1 and np.isfinite(row.get("term/attention", np.nan)) for row in rows)


def chain(parts: Any, tokens: list[int]) -> Any:
    """Params of a model whose every token is followed by the next of `tokens`, whatever stands before it."""
    params = jax.tree.map(np.array, initial_params(parts))
    for kernel in (params["blocks"]["attention"]["out"]["kernel"], params["blocks"]["mlp"]["down"]["kernel"]):
        kernel[:] = 0
    embedding, head = params["embed"]["embedding"], params["head"]["kernel"]
    embedding[:] = head[:] = 0
    for place, (token, following) in enumerate(pairwise(tokens)):
        embedding[token, place] = 1
        head[place, following] = 10
    return params


@pytest.mark.slow
def test_a_model_continues_the_instruction_and_answers_what_it_wrote(tmp_path: Path) -> None:
    parts = build(parse_config({**PAIRS, "output": str(tmp_path), "method": WRITTEN}), RunFolder(tmp_path))
    encode, frame = parts.tokenizer.encode, Frame("Say ", "\nIs:")
    opened_by = chain(parts, [*encode("y dog\nIs:"), parts.tokenizer.eos_id])
    learned = chain(parts, [*encode(": L"), parts.tokenizer.eos_id])
    settings = SyntheticConfig(**WRITTEN["replay"]["synthetic"])
    writer = Writer(parts, 0, opened_by, learned)
    assert writer.bodies(frame, settings, 3, jax.random.key(0)) == ["dog"] * 3
    samples = writer.samples(frame, ["dog", None])
    assert [(one.body, one.answer, one.ended) for one in samples] == [("dog", "L", True), (None, "", True)]
    # The right token scores 40 (a norm makes one of 16 values 4, times 10), the 299 others 0.
    assert samples[0].likelihood == pytest.approx(-math.log1p(299 * math.exp(-40)), abs=1e-6)
    # One that goes on for ever never comes to the suffix.
    writer = Writer(parts, 0, chain(parts, [*encode("y dog"), encode(" ")[0]]), learned)
    assert writer.bodies(frame, settings, 2, jax.random.key(0)) == [None] * 2
    assert writer.samples(frame, [None] * 2) == [Sample(None, "", -math.inf)] * 2


def test_likelihood_is_the_mean_log_probability_of_the_answer(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    parts = build(parse_config({**PAIRS, "output": str(tmp_path), "method": WRITTEN}), folder)
    params = initial_params(parts)
    rows = [{"prompt": f"{body}\nCategory:", "answer": answer} for body, answer in zip(BODIES, "abcdefgh", strict=True)]
    found = Writer(parts, 0, None, params).likelihoods(rows)
    encoded = parts.encode_written(rows, 0, "rows")
    for index in (0, 3, 7):
        prompt, answer = encoded.prompt(index), encoded.answer(index)
        tokens = np.concatenate([prompt, answer])[None]
        ones = np.ones_like(tokens)
        batch = Batch(tokens, ones, np.arange(tokens.shape[1])[None], None, tokens, ones, ones[:, 0], ones[:, 0])
        states = parts.network.hidden(params, batch).states
        scores = jax.nn.log_softmax(parts.network.logits(params, states), axis=-1)[0]
        expected = np.mean([scores[len(prompt) + place - 1, token] for place, token in enumerate(answer)])
        assert found[index] == pytest.approx(float(expected), rel=1e-4)


class Long(Writer):
    """Answers each prompt with as many words as it has."""

    def answers(self, prompts: list[str]) -> list[tuple[list[int], bool]]:
        return [(self.parts.tokenizer.encode(" L" * len(prompt.split())), True) for prompt in prompts]

    def likelihoods(self, rows: Sequence[Mapping[str, str]]) -> list[float]:
        return [-1.0] * len(rows)


def test_samples_longer_than_the_data_do_not_fit(tmp_path: Path) -> None:
    parts = build(parse_config({**PAIRS, "output": str(tmp_path), "method": WRITTEN}), RunFolder(tmp_path))
    found = Long(parts, 0, None, None).samples(Frame("", "\nCategory:"), ["RED " * 200, "RED", None])
    assert [(sample.body, sample.answer) for sample in found] == [("RED", "L L"), (None, ""), (None, "")]


def test_text_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    method = {"name": "replay", "replay": {"source": "synthetic"}}
    with pytest.raises(
        UserError, match=r"method.replay.source: synthetic needs prompts and answers; task topics is text"
    ):
        run(TEXT, tmp_path / "text", method)


@pytest.mark.slow
def test_prompts_are_written_by_the_model_the_run_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers: list[Any] = []

    class Watched(Given):
        def bodies(self, *arguments: Any) -> list[str | None]:
            writers.append(self.opened_by)
            return super().bodies(*arguments)

    monkeypatch.setattr(consolidation, "Writer", Watched)
    parts = build(parse_config({**PAIRS, "output": str(tmp_path), "method": "sequential"}), RunFolder(tmp_path))
    weights = save_hf(tmp_path / "weights", parts.network, initial_params(parts))
    parts.tokenizer.save(weights)
    short = {**PAIRS, "training": {"batch_size": 8, "steps": 2}, "evaluation": {"batch_size": 4, "limit": 1}}
    replay = {"fraction": 0.25, "source": "synthetic", "synthetic": {"candidates": 2}}
    content = {**short, "weights": str(weights), "model": {}, "tokenizer": {}}
    run(content, tmp_path / "run", {"name": "replay", "replay": replay})
    assert len(writers) == 2  # once a task
    for writer in writers:
        jax.tree.map(np.testing.assert_array_equal, writer, load_weights(weights)[1])


def test_an_untrained_model_writes_nothing(tmp_path: Path) -> None:
    method = {"name": "replay", "replay": {"source": "synthetic"}}
    with pytest.raises(UserError, match="writer: start is an untrained model here"):
        run(PAIRS, tmp_path / "run", method)


def test_nothing_worth_keeping_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unfinished(Given):
        def bodies(self, *_: Any) -> list[str | None]:
            return [None] * 4

    monkeypatch.setattr(consolidation, "Writer", Unfinished)
    with pytest.raises(UserError, match="none of 4 samples that the model wrote for task direction can be kept"):
        run(PAIRS, tmp_path / "nothing", WRITTEN)
