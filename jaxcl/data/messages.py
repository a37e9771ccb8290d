"""Conversations as people have them, read into one form: a list of messages with a role and a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, get_args

import numpy as np

from jaxcl.data.images.messages import Images
from jaxcl.data.images.reference import has_images
from jaxcl.data.values import json_kind, lone_surrogate
from jaxcl.errors import UserError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)
# ShareGPT's names of roles, and those of files that follow it.
_SHAREGPT: dict[str, Role] = {"human": "user", "gpt": "assistant", "observation": "tool"}
# Fields that hold a list of messages.
_LISTS = ("messages", "conversations", "conversation")
# What a message may say besides its text. It is refused, because the text alone would be another message.
_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


class Message(TypedDict):
    """One message of a conversation.

    Attributes:
      role: who says it; `tool` is what a tool returned.
      content: the text; images in it are as `jaxcl.data.images.reference` has them.
      lead: an image that the message begins with, for templates that want it apart; see `jaxcl.data.chat_parts`.
    """

    role: Role
    content: str
    lead: NotRequired[str]


def has_conversation(record: Mapping[str, Any]) -> bool:
    """Whether a record's fields are those of a conversation, in one of the forms that `read_messages` reads.

    >>> has_conversation({"messages": []}), has_conversation({"instruction": "", "output": ""})
    (True, True)
    >>> has_conversation({"prompt": "", "answer": ""}), has_conversation({"conversation": "a text"})
    (False, False)
    """
    return any(_is_list(record.get(name)) for name in _LISTS) or {"instruction", "output"} <= set(record)


def up_to_last_answer(messages: Sequence[Message], where: str) -> Sequence[Message]:
    """A conversation without what comes after the last answer, which teaches nothing.

    Args:
      messages: the conversation.
      where: file and row, for messages.

    Raises:
      UserError: no message is the assistant's.
    """
    for count in range(len(messages), 0, -1):
        if messages[count - 1]["role"] == "assistant":
            return messages[:count]
    raise UserError(f"{where}: no message is the assistant's, so there is nothing to learn")


def read_messages(
    record: Mapping[str, Any], where: str, images: Sequence[str] = (), folder: Path | None = None
) -> list[Message]:
    r"""The messages of a record in one of three forms.

    - OpenAI: `messages`, a list of `{"role", "content"}`. A content is a text or a list of parts, which are joined:
      `{"type": "text", "text"}` and `{"type": "image", "path"}`.
    - ShareGPT: `conversations` or `conversation`, a list of `{"from", "value"}`; `human` is the user, `gpt` the
      assistant and `observation` a tool. Either list may have either kind of entry.
    - Alpaca: `instruction` and `output`, perhaps `input`, which follows the instruction on a new line, `system` and
      `history`, a list of earlier `[instruction, output]`.

    Args:
      record: the record; other fields are ignored.
      where: file and row, for messages.
      images: further images of the record, as texts hold them. They are those of parts that say `image` only; or
        of `<image>` in texts of users, as in LLaVA's files; or they come before the first of these texts.
      folder: where relative paths of images start; none: the current folder.

    Returns:
      The messages, in order, with images in their contents. After messages of the system, the first one is the user's.
      There is at least one of the assistant, none of which is empty and no two of which follow each other.

    Raises:
      UserError: there is no conversation, or it is not as above.

    >>> read_messages({"instruction": "Add.", "input": "1 2", "output": "3"}, "sums.jsonl row 1")
    [{'role': 'user', 'content': 'Add.\n1 2'}, {'role': 'assistant', 'content': '3'}]
    >>> read_messages({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    field = next((name for name in _LISTS if name in record), None)
    own = Images(images, folder)
    if field is not None:
        entries = record[field]
        if not _is_list(entries):
            raise UserError(f"{where}: field {field!r} is {json_kind(entries)}; expected a list of messages")
        if _filled(record.get("tools")):
            raise UserError(f"{where}: field 'tools' is not supported; allowed are conversations without tool calls")
        messages = [_message(entry, f"{where}: message {n}", own) for n, entry in enumerate(entries, start=1)]
    elif {"instruction", "output"} <= set(record):
        messages = _alpaca(record, where)
    else:
        raise UserError(
            f"{where}: no conversation; allowed are the fields messages, conversations, conversation, "
            "or instruction and output"
        )
    own.put_in(messages, where)
    _check(messages, where)
    return messages


def _is_list(value: Any) -> bool:
    return isinstance(value, np.ndarray) or (isinstance(value, Sequence) and not isinstance(value, str | bytes))


def _filled(value: Any) -> bool:
    return len(value) > 0 if _is_list(value) else bool(value)


def _message(entry: Any, where: str, images: Images) -> Message:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where} is {json_kind(entry)}; expected an object with role and content")
    # Parquet gives every entry all fields that some entry has.
    role_field, text_field = ("role", "content") if entry.get("role") is not None else ("from", "value")
    if entry.get(role_field) is None:
        raise UserError(f"{where} has neither 'role' nor 'from'; expected role and content, or from and value")
    if text_field not in entry:
        raise UserError(f"{where}: field {text_field!r} is missing")
    role = entry[role_field]
    role = role.decode(errors="replace") if isinstance(role, bytes) else role
    known = _SHAREGPT.get(role, role) if isinstance(role, str) else None
    if known not in ROLES:
        allowed = ", ".join((*ROLES, *_SHAREGPT))
        raise UserError(f"{where}: {role_field} {role!r} is not known; allowed: {allowed}")
    for name in _UNSUPPORTED:
        if _filled(entry.get(name)):
            raise UserError(f"{where}: field {name!r} is not supported; allowed are {role_field} and {text_field}")
    if entry.get("weight") not in (None, 1):
        raise UserError(f"{where}: weight is {entry['weight']!r}; allowed is 1, because every answer is learned alike")
    content = _content(entry[text_field], text_field, where, images)
    if known == "assistant" and has_images(content):
        raise UserError(f"{where}: an answer holds an image; the model writes text only")
    return {"role": known, "content": content}


def _content(value: Any, field: str, where: str, images: Images) -> str:
    if _is_list(value):
        return "".join(_part(part, f"{where}: part {n} of {field!r}", images) for n, part in enumerate(value, start=1))
    return _text(value, field, where)


def _part(part: Any, where: str, images: Images) -> str:
    if not isinstance(part, Mapping):
        raise UserError(f"{where} is {json_kind(part)}; expected an object with type and text")
    if part.get("type") == "image":
        return images.of_part(part, where)
    if part.get("type") != "text":
        raise UserError(f"{where} has the type {part.get('type')!r}; allowed are 'text' and 'image' with a path")
    return _text(part.get("text"), "text", where)


def _text(value: Any, field: str, where: str) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} is {json_kind(value)}; expected text")
    if half := lone_surrogate(value):
        raise UserError(f"{where}: field {field!r} holds {half}; expected text")
    return value


def _alpaca(record: Mapping[str, Any], where: str) -> list[Message]:
    system, given, history = (record.get(name) for name in ("system", "input", "history"))
    messages: list[Message] = []
    if _filled(system):
        messages.append({"role": "system", "content": _text(system, "system", where)})
    for number, turn in enumerate(_history(history, where), start=1):
        before = f"{where}: history {number}"
        messages += _exchange(_text(turn[0], "instruction", before), _text(turn[1], "output", before))
    instruction = _text(record["instruction"], "instruction", where)
    if _filled(given):
        instruction += "\n" + _text(given, "input", where)
    return [*messages, *_exchange(instruction, _text(record["output"], "output", where))]


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _history(history: Any, where: str) -> Iterable[Any]:
    if history is None:
        return ()
    if not _is_list(history) or any(not _is_list(turn) or len(turn) != 2 for turn in history):
        raise UserError(f"{where}: field 'history' is not a list of [instruction, output]")
    return history


def _check(messages: Sequence[Message], where: str) -> None:
    if not messages:
        raise UserError(f"{where}: the conversation is empty")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError(f"{where}: no message is the assistant's, so there is nothing to learn")
    first = next(role for role in roles if role != "system")
    if first != "user":
        raise UserError(
            f"{where}: the conversation starts with the {first}'s message; expected the user's, perhaps after the "
            "system's"
        )
    for number, (message, before) in enumerate(zip(messages, [None, *roles], strict=False), start=1):
        if message["role"] != "assistant":
            continue
        if before == "assistant":
            raise UserError(
                f"{where}: messages {number - 1} and {number} are both the assistant's; expected one answer"
            )
        if not message["content"].strip():
            raise UserError(f"{where}: message {number}: the assistant's answer is empty")
