"""Conversations as text, rendered by a chat template, with the places of the messages and of what is learned.

A template is a program that may do anything with a message, so where a message went is found out and never assumed: the
conversation is rendered once with its own texts and once with marks in their place (once for all conversations of the
same roles), and the two must agree character by character.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from typing import NamedTuple

from jaxcl.data.chat_templates import CHAT_TEMPLATES
from jaxcl.data.messages import Message
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError

#: The day that templates take for today, so that the same rows have the same tokens tomorrow.
TODAY = date(2024, 7, 26)

# Noncharacters of Unicode, which no text should hold: marks are made of those that a conversation does not hold.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Shadows the function of transformers, which gives the time of the call.
_STRFTIME = "{{%- macro strftime_now(format) -%}}{{{{- format{} -}}}}{{%- endmacro -%}}".format(
    "".join(
        f"|replace({code!r}, {TODAY.strftime(code)!r})"
        for code in ("%-d", "%-m", "%d", "%m", "%b", "%B", "%a", "%A", "%Y", "%y", "%j", "%H", "%M", "%S", "%I", "%p")
    )
)


class Piece(NamedTuple):
    """Where a message's text went: characters `start` to `stop` of the rendering."""

    message: int
    start: int
    stop: int


class Rendering(NamedTuple):
    """A rendered conversation.

    Attributes:
      text: what the template wrote. Texts of special tokens in messages are replaced by marks, see `hidden`.
      pieces: where the texts of messages went, in order; blank ones have none, nor have answers that the template
        changes.
      learned: starts and stops of what the model has to write, in order.
      last: where the learned part of the last answer starts, or a character before it.
      hidden: texts of special tokens that messages hold, by their marks.
    """

    text: str
    pieces: list[Piece]
    learned: list[tuple[int, int]]
    last: int
    hidden: dict[str, str]


class _Layout(NamedTuple):
    """What a template writes around the texts of messages.

    Attributes:
      order: the message of each place, in the order of the rendering.
      literals: what is written before each place, and after the last one.
      heads: characters at the end of the literal before an answer that the model has to write, by message.
      tails: characters at the start of the literal after an answer that the model has to write, by message.
    """

    order: list[int]
    literals: list[str]
    heads: dict[int, int]
    tails: dict[int, int]


@functools.lru_cache(maxsize=8)
def renderer(tokenizer: Tokenizer, template: str) -> Renderer:
    """The renderer of a tokenizer and a template; it remembers the layouts that it found."""
    return Renderer(tokenizer, template)


class Renderer:
    """Renders conversations by a chat template, as `apply_chat_template` of transformers does."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        """Wraps a template.

        Args:
          tokenizer: its special tokens are what ends an answer and what messages must not forge.
          template: the template (Jinja).
        """
        self._marked = _GENERATION.search(template) is not None
        self._template = _STRFTIME + template if "strftime_now" in template else template
        # Llama's templates write this date, if it is given, instead of today's.
        self._variables = {"date_string": f"{TODAY:%d %b %Y}"} | tokenizer.special_tokens
        added = tokenizer.backend.get_added_tokens_decoder().values()
        self._special = _any_of(token.content for token in added if token.special)
        self._ends = _any_of(token.content for token in added if token.content.strip())
        self._end_texts = {tokenizer.backend.id_to_token(index) for index in tokenizer.end_ids}
        self._layouts: dict[tuple[tuple[str, str | None], ...], _Layout] = {}

    def render(self, conversations: Sequence[Sequence[Message]], where: Sequence[str]) -> list[Rendering]:
        """Renders conversations.

        Args:
          conversations: the conversations; each ends with the assistant's message.
          where: what each is called in messages.

        Raises:
          UserError: the template fails, or it hides what the model has to write.
        """
        clean = [self._hide(messages, at) for messages, at in zip(conversations, where, strict=True)]
        texts, marks = self._render([messages for messages, _ in clean], where, learned=self._marked)
        return [
            self._locate(messages, hidden, text, spans, at)
            for (messages, hidden), text, spans, at in zip(clean, texts, marks, where, strict=True)
        ]

    def _hide(self, messages: Sequence[Message], where: str) -> tuple[Sequence[Message], dict[str, str]]:
        """Messages without the texts of special tokens, and these by the marks in their place."""
        if not any(self._special.search(message["content"]) for message in messages):
            return messages, {}
        mark = _free_mark([message["content"] for message in messages], where)
        hidden: dict[str, str] = {}

        def replace(found: re.Match[str]) -> str:
            name = f"{mark}{len(hidden)}{mark}"
            hidden[name] = found[0]
            return name

        return [_with(message, self._special.sub(replace, message["content"])) for message in messages], hidden

    def _render(
        self,
        conversations: Sequence[Sequence[Message]],
        where: Sequence[str],
        *,
        ask: bool = False,
        learned: bool = False,
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                list(conversations),
                chat_template=self._template,
                add_generation_prompt=ask,
                return_assistant_tokens_mask=learned,
                **self._variables,
            )
        except Exception as error:  # a template runs any expression, which can fail in any way
            if len(conversations) > 1:
                for messages, at in zip(conversations, where, strict=True):
                    self._render([messages], [at], ask=ask, learned=learned)
            message = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise UserError(f"{where[0]}: the chat template fails: {message}") from None
        return texts, spans if learned else [[] for _ in texts]

    def _locate(
        self,
        messages: Sequence[Message],
        hidden: dict[str, str],
        text: str,
        marked: list[tuple[int, int]],
        where: str,
    ) -> Rendering:
        layout = self._layout(messages, where)
        pieces = _align(text, layout.order, layout.literals, messages)
        changed = pieces is None
        if pieces is None:
            pieces, literals = self._align_others(messages, text, layout, where)
            learned = [] if self._marked else self._fit_answers(messages, text, layout, pieces, literals, where)
        else:
            learned = [
                (piece.start - layout.heads[piece.message], piece.stop + layout.tails[piece.message])
                for piece in pieces
                if piece.message in layout.heads
            ]
        if not self._marked:
            return Rendering(text, pieces, learned, learned[-1][0], hidden)
        learned = [span for span in marked if span[0] < span[1]]
        self._check_marks(messages, pieces, learned, where)
        if changed and not messages[-2]["content"].strip():
            raise UserError(
                f"{where}: the chat template changes answers, and the last one follows a blank message, so that "
                "what is learned cannot be told from the answer before"
            )
        last = max((piece.stop for piece in pieces if piece.message < len(messages) - 1), default=0)
        return Rendering(text, pieces, learned, last, hidden)

    def _align_others(
        self, messages: Sequence[Message], text: str, layout: _Layout, where: str
    ) -> tuple[list[Piece], list[str]]:
        """Places of all messages but the answers, and what is between them, in a rendering that changes answers.

        An example is one that leaves out an answer's reasoning. The answers keep their texts, and marks replace those
        of all others.
        """
        mark = _free_mark([message["content"] for message in messages], where)
        given = [m if m["role"] == "assistant" else _replaced(m, mark, index) for index, m in enumerate(messages)]
        (around,), _ = self._render([given], [where])
        order, literals = _split(around, mark)
        pieces = _align(text, order, literals, messages)
        if pieces is None or order != [index for index in layout.order if messages[index]["role"] != "assistant"]:
            raise UserError(
                f"{where}: the chat template changes the text of a message, so that what is learned cannot be told "
                "from it"
            )
        return pieces, literals

    def _fit_answers(
        self,
        messages: Sequence[Message],
        text: str,
        layout: _Layout,
        pieces: Sequence[Piece],
        literals: Sequence[str],
        where: str,
    ) -> list[tuple[int, int]]:
        """What is learned of answers that the template changes.

        What it writes before an answer's own part, and after it, is the same whatever the answer says.
        """
        starts = [0, *(piece.stop for piece in pieces)]
        gap = 0
        learned = []
        for place, index in enumerate(layout.order):
            if messages[index]["role"] != "assistant":
                gap += 1
                continue
            before, after = layout.literals[place], layout.literals[place + 1]
            fixed = before[: len(before) - layout.heads[index]]
            first = starts[gap] + len(fixed)
            last = starts[gap] + len(literals[gap]) - len(after)
            if not (first < last and text.startswith(fixed, starts[gap]) and text.startswith(after, last)):
                raise UserError(
                    f"{where}: message {index + 1}: the chat template changes what it writes around the answer, so "
                    "that what is learned cannot be told from it"
                )
            learned.append((first, last + layout.tails[index]))
        return learned

    def _check_marks(
        self, messages: Sequence[Message], pieces: Sequence[Piece], learned: Sequence[tuple[int, int]], where: str
    ) -> None:
        if not learned:
            raise UserError(f"{where}: the chat template marks nothing to learn ({{% generation %}})")
        for piece in pieces:
            role = messages[piece.message]["role"]
            if role != "assistant" and any(start < piece.stop and piece.start < stop for start, stop in learned):
                raise UserError(f"{where}: the chat template marks the {role}'s message {piece.message + 1} as learned")

    def _layout(self, messages: Sequence[Message], where: str) -> _Layout:
        key = tuple((m["role"], None if m["content"].strip() else m["content"]) for m in messages)
        if key not in self._layouts:
            self._layouts[key] = self._find_layout(messages, where)
        return self._layouts[key]

    def _find_layout(self, messages: Sequence[Message], where: str) -> _Layout:
        mark = _NONCHARACTERS[0]
        given = [_replaced(message, mark, index) for index, message in enumerate(messages)]
        (text,), _ = self._render([given], [where])
        order, literals = _split(text, mark)
        for index, message in enumerate(messages):
            answer, count = message["role"] == "assistant", order.count(index)
            if message["content"].strip() and not count:
                raise UserError(f"{where}: the chat template leaves out the {message['role']}'s message {index + 1}")
            if answer and count > 1:
                raise UserError(f"{where}: the chat template repeats the {message['role']}'s message {index + 1}")
        layout = _Layout(order, literals, {}, {})
        if not self._marked:
            for place, index in enumerate(order):
                if messages[index]["role"] == "assistant":
                    layout.heads[index] = self._head(given[:index], literals[place], mark, where)
                    layout.tails[index] = self._tail(given[: index + 1], literals[place + 1], mark, where)
        return layout

    def _head(self, before: Sequence[Message], literal: str, mark: str, where: str) -> int:
        """Characters of the literal before an answer that come after the generation prompt."""
        (text,), _ = self._render([before], [where], ask=True)
        asked = _split(text, mark)[1][-1]
        if literal.startswith(asked):
            return len(literal) - len(asked)
        if asked.startswith(literal):
            return 0  # the prompt also writes how an answer begins, for example that it thinks
        raise UserError(
            f"{where}: the chat template asks for an answer with {asked!r}, but writes {literal!r} before one; "
            "allowed is a template with {% generation %} marks"
        )

    def _tail(self, upto: Sequence[Message], literal: str, mark: str, where: str) -> int:
        """Characters of the literal after an answer up to its end token."""
        end = self._ends.search(literal)
        (text,), _ = self._render([upto], [where])
        closing = _split(text, mark)[1][-1]
        if end is None or not (closing.startswith(literal[: end.end()]) or end[0] in self._end_texts):
            raise UserError(
                f"{where}: the chat template writes no end token after an answer, so that the model would not learn to "
                f"stop; allowed is a template that does, by name: {', '.join(CHAT_TEMPLATES)}"
            )
        return end.end()


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(set(texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _free_mark(texts: Sequence[str], where: str) -> str:
    for mark in _NONCHARACTERS:
        if not any(mark in text for text in texts):
            return mark
    raise UserError(f"{where}: the texts hold all noncharacters U+FDD0 to U+FDEF; expected text")


def _with(message: Message, content: str) -> Message:
    return {"role": message["role"], "content": content}


def _replaced(message: Message, mark: str, index: int) -> Message:
    """A message with a mark instead of its text; blank ones stay, because templates treat them in their own way."""
    return _with(message, f"{mark}{index}{mark}") if message["content"].strip() else message


def _split(text: str, mark: str) -> tuple[list[int], list[str]]:
    """The messages whose marks a text holds, and what is between them."""
    parts = re.split(f"{mark}([0-9]+){mark}", text)
    return [int(index) for index in parts[1::2]], parts[::2]


def _align(text: str, order: Sequence[int], literals: Sequence[str], messages: Sequence[Message]) -> list[Piece] | None:
    """Where the messages are in a text, given what is written around them; none if they do not make up the text."""
    if not text.startswith(literals[0]):
        return None
    place = len(literals[0])
    pieces = []
    for index, literal in zip(order, literals[1:], strict=True):
        for form in _forms(messages[index]["content"]):
            if text.startswith(form, place) and text.startswith(literal, place + len(form)):
                break
        else:
            return None
        pieces.append(Piece(index, place, place + len(form)))
        place += len(form) + len(literal)
    return pieces if place == len(text) else None


def _forms(content: str) -> Iterator[str]:
    """What templates make of a text: it may lose outer white space, or be written as a JSON string."""
    yield content
    for space in ("\n", None):
        yield content.rstrip(space)
        yield content.lstrip(space)
        yield content.strip(space)
    yield json.dumps(content, ensure_ascii=False)[1:-1]
