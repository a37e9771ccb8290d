"""Ids and learned tokens of conversations, as `apply_chat_template` of transformers gives them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jaxcl.data.conversations import EncodedConversations, Learn, encode_conversations
from jaxcl.data.messages import Message
from jaxcl.data.tokenizer import Tokenizer
from tests.tiny.chats import FAMILIES, chat_tokenizer, turns

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
@settings(max_examples=150)
@given(messages=conversations())
def test_ids_and_mask_are_those_of_transformers(name: str, marks: bool, messages: list[Message]) -> None:
    expected = theirs(name).apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ids, learned = ours(chat_tokenizer(name, marks=marks), messages)
    assert ids == expected["input_ids"]
    assert learned == expected["assistant_masks"]
