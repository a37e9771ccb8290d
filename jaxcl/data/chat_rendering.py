"""Conversations as text, rendered by a chat template, with the places of the messages and of what is learned.

A template is a program that may do anything with a message, so where a message went is found out and never assumed: the
conversation is rendered once with its own texts and once with marks in their place (once for all conversations of the
same roles), and the two must agree character by character.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple

from jaxcl.data.chat_parts import as_parts, marked_images, without_lead
from jaxcl.data.chat_templates import CHAT_TEMPLATES
from jaxcl.data.messages import Message, Role
from jaxcl.data.template_worker import TemplateError, render
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError

#: The day that templates take for today, so that the same rows have the same tokens tomorrow.
TODAY = date(2024, 7, 26)

# Noncharacters of Unicode, which no text should hold: marks are made of those that a conversation does not hold.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_MARKS = re.compile(r"(\{%-?)\s*(?:end)?generation\s*(-?%\})")
_MENTIONS_PARTS = re.compile(r"['\"]type['\"]|\.type\b")
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


def without_marks(template: str) -> str:
    """A template without its generation marks; it renders the same text.

    >>> without_marks("{%- generation %}{{ m }}{%- endgeneration -%}")
    '{%- set _ = 0 %}{{ m }}{%- set _ = 0 -%}'
    """
    return _MARKS.sub(r"\1 set _ = 0 \2", template)


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
        self._trusted = any(template in (known, without_marks(known)) for known in CHAT_TEMPLATES.values())
        self._marked = _GENERATION.search(template) is not None
        self._template = _STRFTIME + template if "strftime_now" in template else template
        # Llama's templates write this date, if it is given, instead of today's.
        self._variables = {"date_string": f"{TODAY:%d %b %Y}"} | tokenizer.special_tokens
        added = tokenizer.backend.get_added_tokens_decoder().values()
        self._special = _any_of(token.content for token in added if token.special)
        self._ends = _any_of(token.content for token in added if token.content.strip())
        self._end_texts = {tokenizer.backend.id_to_token(index) for index in tokenizer.end_ids}
        self._layouts: dict[tuple[tuple[str, bool, str | None], ...], _Layout] = {}
        self._in_parts = _MENTIONS_PARTS.search(template) is not None and self._wants_parts()

    def render(self, conversations: Sequence[Sequence[Message]], where: Sequence[str]) -> list[Rendering]:
        """Renders conversations.

        Args:
          conversations: the conversations; each ends with the assistant's message.
          where: what each is called in messages.

        Raises:
          UserError: the template fails, or it hides what the model has to write.
        """
        if self._in_parts:
            conversations = [[without_lead(message) for message in messages] for messages in conversations]
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
        given: Sequence[Sequence[Mapping[str, Any]]] = conversations
        if self._in_parts:
            given = [[as_parts(message) for message in messages] for messages in conversations]
        try:
            found = render(self._template, given, self._variables, ask=ask, learned=learned, trusted=self._trusted)
        except TemplateError as error:
            raise UserError(f"{where[error.index]}: the chat template fails: {error}") from None
        if self._in_parts:
            found = [marked_images(text, spans) for text, spans in found]
        return [text for text, _ in found], [spans for _, spans in found]

    def _wants_parts(self) -> bool:
        """Whether the template writes a text that is given as a list of parts only."""
        mark = _NONCHARACTERS[0]
        plain: Message = {"role": "user", "content": mark}
        written = []
        for message in (plain, as_parts(plain)):
            try:
                ((text, _),) = render(self._template, [[message]], self._variables, trusted=self._trusted)
            except TemplateError:
                text = ""
            written.append(text.count(mark))
        return written == [0, 1]

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
        if pieces is None:
            pieces = self._align_changed(messages, text, layout, where)
            learned = [(p.start, p.stop + layout.tails[p.message]) for p in pieces if p.message in layout.tails]
        else:
            answers = [piece for piece in pieces if piece.message in layout.tails]
            learned = [(p.start - layout.heads[p.message], p.stop + layout.tails[p.message]) for p in answers]
        if not self._marked:
            return Rendering(text, pieces, learned, learned[-1][0], hidden)
        learned = [span for span in marked if span[0] < span[1]]
        self._check_marks(messages, pieces, learned, where)
        # The template may leave nothing of an answer but its end token.
        earlier = [piece for piece in pieces if piece.message < len(messages) - 1]
        last = max((piece.stop + layout.tails.get(piece.message, 0) for piece in earlier), default=0)
        return Rendering(text, pieces, learned, last, hidden)

    def _align_changed(self, messages: Sequence[Message], text: str, layout: _Layout, where: str) -> list[Piece]:
        """Places in a rendering that changes answers, such as one that leaves out an answer's reasoning.

        What becomes of an answer is found by a rendering in which it is the only message with its own text. It includes
        the part of the literal before it that the model has to write, because that depends on the answer, too.
        """
        mark = _free_mark([message["content"] for message in messages], where)
        given = [_replaced(message, mark, index) for index, message in enumerate(messages)]
        changed, literals = list(messages), list(layout.literals)
        for place, index in enumerate(layout.order):
            if messages[index]["role"] != "assistant":
                continue
            (alone,), _ = self._render([[*given[:index], messages[index], *given[index + 1 :]]], [where])
            order, around = _split(alone, mark)
            before, after = layout.literals[place : place + 2]
            before = before[: len(before) - layout.heads[index]]
            if (
                order != [*layout.order[:place], *layout.order[place + 1 :]]
                or not (around[place].startswith(before) and around[place].endswith(after))
                or len(around[place]) < len(before) + len(after)
            ):
                raise UserError(
                    f"{where}: message {index + 1}: the chat template changes what it writes around the answer, so "
                    "that what is learned cannot be told from it"
                )
            changed[index] = _with(messages[index], around[place][len(before) : len(around[place]) - len(after)])
            literals[place] = before
        pieces = _align(text, layout.order, literals, changed)
        if pieces is None:
            raise UserError(
                f"{where}: the chat template changes the text of a message, so that what is learned cannot be told "
                "from it"
            )
        return pieces

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
        key = tuple((m["role"], "lead" in m, None if m["content"].strip() else m["content"]) for m in messages)
        if key not in self._layouts:
            self._layouts[key] = self._find_layout(messages, where)
        return self._layouts[key]

    def _find_layout(self, messages: Sequence[Message], where: str) -> _Layout:
        mark = _NONCHARACTERS[0]
        (text,), _ = self._render([[_replaced(message, mark, n) for n, message in enumerate(messages)]], [where])
        order, literals = _split(text, mark)
        for index, message in enumerate(messages):
            answer, count = message["role"] == "assistant", order.count(index)
            if answer and not message["content"].strip():
                raise UserError(f"{where}: message {index + 1}: the assistant's answer is empty")
            if message["content"].strip() and not count:
                raise UserError(f"{where}: the chat template leaves out the {message['role']}'s message {index + 1}")
            if answer and count > 1:
                raise UserError(f"{where}: the chat template repeats the {message['role']}'s message {index + 1}")
        layout = _Layout(order, literals, {}, {})
        answers = self._answers([message["role"] for message in messages], where)
        for place, index in enumerate(order):
            if index in answers:
                head, tail = answers[index]
                fits = literals[place].endswith(head) and literals[place + 1].startswith(tail)
                if not fits and not self._marked:
                    raise UserError(
                        f"{where}: the chat template writes something else around an answer when a message is blank"
                    )
                layout.heads[index], layout.tails[index] = (len(head), len(tail)) if fits else (0, 0)
        return layout

    def _answers(self, roles: Sequence[Role], where: str) -> dict[int, tuple[str, str]]:
        """What the model has to write before and after the text of each answer, in conversations of some roles."""
        mark = _NONCHARACTERS[0]
        given: list[Message] = [{"role": role, "content": f"{mark}{n}{mark}"} for n, role in enumerate(roles)]
        (text,), _ = self._render([given], [where])
        order, literals = _split(text, mark)
        answers = {}
        for place, index in enumerate(order):
            if roles[index] == "assistant":
                head = self._head(given[:index], literals[place], mark, where)
                answers[index] = head, self._tail(given[: index + 1], literals[place + 1], mark, where)
        return answers

    def _head(self, before: Sequence[Message], literal: str, mark: str, where: str) -> str:
        """What the literal before an answer holds after the generation prompt."""
        (text,), _ = self._render([before], [where], ask=True)
        asked = _split(text, mark)[1][-1]
        if literal.startswith(asked):
            return literal[len(asked) :]
        # The prompt may also write how an answer begins, for example that it thinks.
        if asked.startswith(literal) or self._marked:
            return ""
        raise UserError(
            f"{where}: the chat template asks for an answer with {asked!r}, but writes {literal!r} before one; "
            "allowed is a template with {% generation %} marks"
        )

    def _tail(self, upto: Sequence[Message], literal: str, mark: str, where: str) -> str:
        """What the literal after an answer holds up to its end token."""
        end = self._ends.search(literal)
        (text,), _ = self._render([upto], [where])
        closing = _split(text, mark)[1][-1]
        if end is not None and (closing.startswith(literal[: end.end()]) or end[0] in self._end_texts):
            return literal[: end.end()]
        if self._marked:
            return ""
        raise UserError(
            f"{where}: the chat template writes no end token after an answer, so that the model would not learn to "
            f"stop; allowed is a template that does, by name: {', '.join(CHAT_TEMPLATES)}"
        )


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(set(texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _free_mark(texts: Sequence[str], where: str) -> str:
    for mark in _NONCHARACTERS:
        if not any(mark in text for text in texts):
            return mark
    raise UserError(f"{where}: the texts hold all noncharacters U+FDD0 to U+FDEF; expected text")


def _with(message: Message, content: str) -> Message:
    changed = message.copy()
    changed["content"] = content
    return changed


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
