"""Runs over conversations."""

import json

import pytest

from jaxcl.config import parse_config
from jaxcl.data.chat_rows import ChatRows, encode_openings
from jaxcl.data.chat_templates import CHAT_TEMPLATES
from jaxcl.data.conversations import end_of_turn
from jaxcl.data.sources import load_source
from jaxcl.data.spec import DataConfig
from jaxcl.data.tokenizer import Tokenizer
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
            rows = [{"messages": conversation(n)} for n in range(count if split == "train" else 4)]
            if name == "alpaca":
                rows = [{"instruction": f"say {ANSWERS[n % 2]}", "input": "", "output": "no"} for n in range(len(rows))]
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat_tokenizer("chatml").save(folder / "tokenizer")


def config(folder, method, **data):
    return {
        "model": {**DECODER, "vocab_size": 520, "max_length": 128},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {"prompt_length": 96, "answer_length": 16, "buckets": 1, "cache": str(folder / "cache"), **data},
        "tasks": [{"name": name, "source": f"jsonl:{folder / name}"} for name in ("chats", "alpaca")],
        "training": {"batch_size": 8, "epochs": 1, "checkpoint_every": 2},
        "evaluation": {"batch_size": 4, "max_new_tokens": 8},
        "method": method,
        "output": str(folder / "run"),
    }


def test_seekr_learns_conversations_one_task_after_another(tmp_path):
    write_tasks(tmp_path)
    outcome = sequence.run(parse_config(config(tmp_path, SEEKR)))
    assert outcome.results.finished
    path = tmp_path / "run" / "predictions" / "after01_task00.jsonl"
    asked = [json.loads(json.loads(line)["prompt"]) for line in path.read_text().splitlines()]
    assert asked == [conversation(number)[:-1] for number in range(4)]
    assert outcome.results.data["chats"]["sources"]["chats"]["dropped_turns"] == 0


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
    openings = encode_openings([row["prompt"] for row in task.train], tokenizer, data).ids
    for index, opening in enumerate(openings):
        assert rows.prompt(index).tolist() == opening
        assert rows.answer(index)[-1] == end_of_turn(tokenizer) == tokenizer.backend.token_to_id("<|im_end|>")


def test_a_tokenizer_without_a_chat_template_is_refused_before_training(tmp_path):
    write_tasks(tmp_path)
    content = config(tmp_path, {"name": "sequential"})
    content["tokenizer"] = TOKENIZER
    with pytest.raises(UserError, match=r"no chat template.*data\.chat_template"):
        sequence.run(parse_config(content))


def test_written_samples_are_not_for_conversations(tmp_path):
    write_tasks(tmp_path)
    method = {"name": "replay", "replay": {"source": "synthetic", "fraction": 0.25}}
    with pytest.raises(UserError, match="needs prompts and answers; task chats is chat"):
        sequence.run(parse_config(config(tmp_path, method)))


ENCLOSING = (
    "{%- for m in messages %}{%- if m['role'] == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}{% endgeneration %}{%- else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def test_marks_that_enclose_more_than_the_answer_change_neither_prompt_nor_end():
    known = chat_tokenizer("chatml")
    ids = {"pad": known.pad_id, "bos": known.bos_id, "eos": known.eos_id}
    tokenizer = Tokenizer(known.backend, ids, add_bos=known.add_bos, chat_template=ENCLOSING)
    assert end_of_turn(tokenizer) == known.backend.token_to_id("<|im_end|>")
    (opening,) = encode_openings(
        [json.dumps([{"role": "user", "content": "hello"}])], tokenizer, DataConfig(prompt_length=96)
    ).ids
    assert tokenizer.decode(opening, skip_special=False).endswith("hello<|im_end|>\n<|im_start|>assistant\n")


def test_a_run_leaves_the_template_and_the_end_of_its_conversations(tmp_path):
    write_tasks(tmp_path)
    known = chat_tokenizer("chatml")
    ids = {"pad": known.pad_id, "bos": known.bos_id, "eos": known.backend.token_to_id("<|im_start|>")}
    Tokenizer(known.backend, ids, add_bos=False).save(tmp_path / "bare")
    content = config(tmp_path, {"name": "sequential"}, chat_template="chatml")
    content["tokenizer"] = {"path": str(tmp_path / "bare")}
    parts = build(parse_config(content), RunFolder(tmp_path / "run"))
    left = Tokenizer.load(RunFolder(tmp_path / "run").tokenizer)
    assert left.backend.token_to_id("<|im_end|>") in left.end_ids
    assert set(parts.tokenizer.end_ids) == set(left.end_ids)
    assert left.chat_template == CHAT_TEMPLATES["chatml"]


def test_openings_that_do_not_fit_are_refused_before_training(tmp_path):
    write_tasks(tmp_path)
    long = [{"role": "system", "content": "word " * 60}, *conversation(0)]
    (tmp_path / "chats" / "test.jsonl").write_text(json.dumps({"messages": long}) + "\n")
    content = config(tmp_path, {"name": "sequential"}, prompt_length=40, answer_length=80)
    with pytest.raises(UserError, match=r"task chats: scored test row 1: .* prompt_length alone"):
        sequence.run(parse_config(content))
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
