"""Runs over conversations."""

import json

import pytest

from jaxcl.config import parse_config
from jaxcl.data.chat_rows import ChatRows, encode_openings, turn_end
from jaxcl.data.sources import load_source
from jaxcl.data.spec import DataConfig
from jaxcl.errors import UserError
from jaxcl.run import sequence
from jaxcl.run.components import build
from jaxcl.run.folder import RunFolder
from tests.tiny.chats import chat_tokenizer
from tests.tiny.runs import DECODER, SEEKR, TOKENIZER

ANSWERS = ("left", "right")


def conversation(number):
    first = {"role": "user", "content": f"say {ANSWERS[number % 2]}"}
    turns = [first, {"role": "assistant", "content": ANSWERS[number % 2]}]
    return [*turns, {"role": "user", "content": "again"}, {"role": "assistant", "content": ANSWERS[number % 2]}]


def write_tasks(folder):
    for name, count in (("chats", 24), ("alpaca", 16)):
        (folder / name).mkdir()
        for split in ("train", "test"):
            path = tmp_path / "run" / "predictions" / "after01_task00.jsonl"
    asked = [json.loads(json.loads(line)["prompt"]) for line in path.read_text().splitlines()]
    assert asked == [conversation(number)[:-1] for number in range(4)]
    described = outcome.results.data["chats"]
    assert described["sources"]["chats"]["dropped_turns"] == 0


def test_every_answer_or_the_last_one_is_learned(tmp_path):
    write_tasks(tmp_path)
    tokenizer = chat_tokenizer("chatml")
    ends = {}
    for learn in ("all", "last"):
        parts = build(parse_config(config(tmp_path, {"name": "sequential"}, learn=learn)), RunFolder(tmp_path / learn))
        batch = parts.pipeline([parts.train_rows(0)]).batch_at(0, seed=0, process_index=0, process_count=1)
        targets = batch["targets"][0][batch["weights"][0] > 0]
        ends[learn] = [i for i in targets.tolist() if i == tokenizer.backend.token_to_id("<|im_end|>")]
        assert "say" not in tokenizer.decode(targets)
    assert (len(ends["all"]), len(ends["last"])) == (2, 1)


def test_what_the_model_is_asked_is_what_it_was_trained_on(tmp_path):
    tokenizer = chat_tokenizer("chatml")
    data = DataConfig(prompt_length=96, answer_length=16)
    write_tasks(tmp_path)
    task = load_source(f"jsonl:{tmp_path / 'chats'}")
    assert task.kind == "chat"
    rows = ChatRows(task.train, tokenizer, data.model_copy(update={"learn": "last"}), task=0, name="chats")
    openings = encode_openings([row["prompt"] for row in task.train], tokenizer, data)
    for index, opening in enumerate(openings):
        assert rows.prompt(index).tolist() == opening
        assert rows.answer(index)[-1] == turn_end(tokenizer, data) == tokenizer.backend.token_to_id("<|im_end|>")


def test_a_tokenizer_without_a_chat_template_is_refused_before_training(tmp_path):
    write_tasks(tmp_path)
    content = config(tmp_path, {"name": "sequential"})
    content["tokenizer"] = TOKENIZER
    with pytest.raises(UserError, match="no chat template.*data.chat_template"):
        sequence.run(parse_config(content))


def test_written_samples_are_not_for_conversations(tmp_path):
    write_tasks(tmp_path)
    method = {"name": "replay", "replay": {"source": "synthetic", "fraction": 0.25}}
    with pytest.raises(UserError, match="needs prompts and answers; task chats is chat"):
        sequence.run(parse_config(config(tmp_path, method)))
