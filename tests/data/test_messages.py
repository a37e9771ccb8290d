"""Conversations in three forms, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxcl.data.messages import has_conversation, read_messages
from jaxcl.errors import UserError
from tests.tiny.chats import turns

HELLO = turns("Hi", "Hello", system="Be kind.")
USER, GPT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": HELLO, "id": 7},
        {"messages": np.array(HELLO, dtype=object)},
        {"messages": [{"role": b"system", "content": b"Be kind."}, USER, {**GPT, "weight": 1, "tool_calls": None}]},
        {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in HELLO]},
        {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}, GPT]},
        # All entries have the fields that some have, as in parquet.
        {"conversation": [{"role": None, "content": None, "from": m["role"], "value": m["content"]} for m in HELLO]},
        {"instruction": "Hi", "input": "", "output": "Hello", "system": "Be kind."},
        {"instruction": "Hi", "input": None, "output": "Hello", "system": "Be kind.", "history": []},
    ],
)
def test_forms_of_one_conversation(record: dict[str, Any]) -> None:
    assert has_conversation(record)
    assert read_messages(record, "rows.jsonl row 1") == HELLO


def test_roles_parts_and_turns() -> None:
    values = [("human", "a"), ("gpt", "b"), ("observation", "c"), ("gpt", "d"), ("human", "e")]
    messages = read_messages({"conversations": [{"from": role, "value": text} for role, text in values]}, "")
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant", "user"]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    assert read_messages({"messages": [{"role": "user", "content": parts}, GPT]}, "")[0]["content"] == "a b"
    record = {"instruction": "Add.", "input": "3", "output": "6", "history": [["Count.", "1 2"], ("More.", "3")]}
    assert read_messages(record, "") == turns("Count.", "1 2", "More.", "3", "Add.\n3", "6")
    # A user may say nothing or say two things, and the last word may be anybody's.
    read_messages({"messages": [{"role": "user", "content": ""}, USER, GPT, USER]}, "")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "no conversation; allowed are the fields messages, conversations"),
        ({"messages": "Hi"}, "field 'messages' is text; expected a list of messages"),
        ({"messages": None}, "field 'messages' is null; expected a list"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": ["Hi"]}, "message 1 is text; expected an object with role and content"),
        ({"messages": [{"content": "Hi"}]}, "message 1 has neither 'role' nor 'from'"),
        ({"messages": [{"role": "user"}]}, "message 1: field 'content' is missing"),
        (
            {"messages": [USER, {"role": "bot", "content": "a"}]},
            "message 2: role 'bot' is not known; allowed: system, u",
        ),
        ({"messages": [USER, {"role": ["user"], "content": "a"}]}, r"message 2: role \['user'\] is not known"),
        ({"messages": [{"role": "user", "content": None}, GPT]}, "message 1: field 'content' is null; expected text"),
        ({"messages": [{"role": "user", "content": 5}, GPT]}, "message 1: field 'content' is int; expected text"),
        ({"messages": [{"role": "user", "content": "\ud83d"}, GPT]}, "message 1: field 'content' holds half of a surr"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, GPT]},
            "message 1: part 2 of 'content' has the type 'image_url'; allowed are 'text' and 'image' with a path",
        ),
        (
            {"messages": [{"role": "user", "content": ["a"]}, GPT]},
            "message 1: part 1 of 'content' is text; expected an",
        ),
        (
            {"messages": [USER, {**GPT, "content": None, "tool_calls": [{}]}]},
            "message 2: field 'tool_calls' is not supp",
        ),
        ({"messages": [USER, {**GPT, "reasoning_content": "So."}]}, "message 2: field 'reasoning_content' is not supp"),
        ({"messages": [USER, {**GPT, "weight": 0}]}, "message 2: weight is 0; allowed is 1"),
        ({"messages": [USER, GPT], "tools": [{}]}, "field 'tools' is not supported"),
        ({"messages": [USER]}, "no message is the assistant's"),
        ({"messages": [GPT, USER, GPT]}, "the conversation starts with the assistant's message; expected the user's"),
        ({"messages": [{"role": "system", "content": "a"}, GPT]}, "the conversation starts with the assistant's"),
        ({"messages": [{"role": "system", "content": "a"}]}, "no message is the assistant's"),
        ({"messages": [USER, GPT, USER, GPT, GPT]}, "messages 4 and 5 are both the assistant's"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "message 2: the assistant's answer is empty"),
        ({"instruction": "Hi", "output": ""}, "message 2: the assistant's answer is empty"),
        ({"instruction": None, "output": "a"}, "field 'instruction' is null; expected text"),
        ({"instruction": "a", "input": {"b": 1}, "output": "a"}, "field 'input' is an object; expected text"),
        ({"instruction": "a", "output": "a", "history": [["b"]]}, r"field 'history' is not a list of \[instr"),
        ({"instruction": "a", "output": "a", "history": [["b", 1]]}, "history 1: field 'output' is int; expected text"),
    ],
)
def test_what_is_refused_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_messages(record, "chats.jsonl row 3")
    assert str(caught.value).startswith("chats.jsonl row 3: ")
    assert "\n" not in str(caught.value)


def test_what_is_not_a_conversation() -> None:
    for record in ({}, {"prompt": "a", "answer": "b"}, {"instruction": "a"}, {"messages": None}, {"conversation": "a"}):
        assert not has_conversation(record)
