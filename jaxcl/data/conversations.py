"""Conversations as token ids, with the spans that are learned: what the assistant writes."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from jaxcl.data.chat_images import with_images
from jaxcl.data.chat_rendering import Piece, Renderer, Rendering, renderer, without_marks
from jaxcl.data.chat_templates import find_template
from jaxcl.data.chat_tokens import Tokens, tokenize
from jaxcl.data.images.seen import Pixels, Seen, look
from jaxcl.data.messages import Message, up_to_last_answer
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError

#: Which answers of a conversation are learned.
Learn = Literal["all", "last"]


class EncodedConversations(NamedTuple):
    """Conversations as token ids.

    Attributes:
      ids: token ids per conversation, at most `length`.
      spans: lengths of alternating runs per conversation: not learned (perhaps 0), learned, not learned and so on. They
        sum to the number of its ids.
      dropped_turns: old exchanges (a user's message and what follows it, up to the next) left out for length.
      cut: conversations of which a message was cut for length.
      pixels: tiles of the images of each conversation, `None` without images.
    """

    ids: list[list[int]]
    spans: list[list[int]]
    dropped_turns: int
    cut: int
    pixels: list[Pixels | None]


class _Row(NamedTuple):
    """A conversation as token ids, `learned` ranges of them, and what it takes to find a message's tokens."""

    ids: list[int]
    learned: list[tuple[int, int]]
    rendering: Rendering
    tokens: Tokens
    opening: int

    def inside(self, piece: Piece) -> tuple[int, int]:
        """The range of the tokens that hold nothing but a message's text."""
        start, stop = self.tokens.starting_from(piece.start), self.tokens.ending_after(piece.stop)
        return self.opening + start, self.opening + max(start, stop)


def encode_conversations(
    conversations: Sequence[Sequence[Message]],
    tokenizer: Tokenizer,
    *,
    length: int,
    learn: Learn,
    where: Callable[[int], str],
    template: str = "model",
    on_long_answer: Literal["error", "cut"] = "error",
    marks: bool = True,
) -> EncodedConversations:
    """Token ids of conversations and what is learned of them.

    A conversation is rendered by a chat template and tokenised as a whole. What is learned of an answer is what the
    template's generation marks say, or without such marks, what follows the generation prompt, through the token that
    ends the turn. The text of a special token in a message is data: it is spelled out. Messages after the last answer
    teach nothing and are left out. The `bos` token is written once, by the template or else, if the model expects it,
    here.

    A conversation that is too long loses its oldest exchanges, never messages of the system that open it. If the last
    exchange alone is too long, the longest message that is neither the system's nor the assistant's is cut on the left;
    one token of it remains.

    Args:
      conversations: messages per conversation, as `read_messages` returns them.
      tokenizer: the model's tokenizer.
      length: maximal number of tokens of a conversation.
      learn: which answers are learned.
      where: what the conversation of an index is called in messages.
      template: `model` for the tokenizer's own chat template, or a name of `CHAT_TEMPLATES`.
      on_long_answer: what happens to a conversation that is still too long: an error, or it keeps up to `length // 4`
        tokens of the cut message and loses its end.
      marks: whether generation marks count; without, what is learned follows the generation prompt in any template.

    Raises:
      UserError: there is no chat template, it fails or hides what is to be learned, or a conversation is too long.
    """
    found = find_template(template, tokenizer)
    render = renderer(tokenizer, found if marks else without_marks(found))
    encode = functools.partial(_encode, tokenizer=tokenizer, render=render, learn=learn)
    names = [where(index) for index in range(len(conversations))]
    answered = [up_to_last_answer(messages, name) for messages, name in zip(conversations, names, strict=True)]
    looked = [_look(messages, tokenizer, name) for messages, name in zip(answered, names, strict=True)]
    kept, seen = [messages for messages, _ in looked], [one for _, one in looked]
    rows = encode(kept, where=names, replacements=[one.replacements for one in seen])
    for row, one, name in zip(rows, seen, names, strict=True):
        if one.replacements and len(row.ids) > length:
            raise UserError(
                f"{name}: the conversation has {len(row.ids)} tokens with its images, and one with images is not cut; "
                f"a conversation may have {length} (data.prompt_length + data.answer_length); raise them"
            )
    dropped, cut = _shorten(rows, kept, encode, length, on_long_answer, names)
    spans = [_runs(row.learned, len(row.ids)) for row in rows]
    return EncodedConversations([row.ids for row in rows], spans, dropped, cut, [one.pixels for one in seen])


def end_of_turn(tokenizer: Tokenizer, template: str = "model") -> int:
    """Id of the token that ends an answer, at which generation has to stop; it need not be the tokenizer's `eos` token.

    Args:
      tokenizer: the model's tokenizer.
      template: see `encode_conversations`.

    Raises:
      UserError: there is no chat template, it fails or hides what is to be learned.
    """
    messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = encode_conversations(
        [messages],
        tokenizer,
        length=sys.maxsize,
        learn="last",
        where=lambda _: "a short conversation",
        template=template,
        marks=False,  # they may enclose what follows the end token
    )
    return found.ids[0][sum(found.spans[0][:2]) - 1]


def _look(messages: Sequence[Message], tokenizer: Tokenizer, where: str) -> tuple[Sequence[Message], Seen]:
    """Messages with one mark in the place of each image, and what is in the images."""
    seen = look([message["content"] for message in messages], tokenizer.images, where)
    if seen.pixels is None:
        return messages, seen
    return [
        {"role": message["role"], "content": text} for message, text in zip(messages, seen.texts, strict=True)
    ], seen


def _shorten(
    rows: list[_Row],
    kept: list[Sequence[Message]],
    encode: Callable[..., list[_Row]],
    length: int,
    on_long_answer: str,
    where: Sequence[str],
) -> tuple[int, int]:
    """Shortens what is too long, in place; returns the numbers of dropped exchanges and of cut conversations."""
    dropped = 0
    cut = 0
    long = [index for index, row in enumerate(rows) if len(row.ids) > length]
    while long:
        again = []
        for index in long:
            starts = _exchanges(kept[index])
            if len(starts) > 1:
                count = _exchanges_to_drop(rows[index], starts, length)
                kept[index] = [*kept[index][: starts[0]], *kept[index][starts[count] :]]
                dropped += count
                again.append(index)
            else:
                rows[index] = _cut(rows[index], kept[index], length, on_long_answer, where[index])
                cut += 1
        shorter = encode([kept[index] for index in again], where=[where[index] for index in again])
        for index, row in zip(again, shorter, strict=True):
            rows[index] = row
        long = [index for index in again if len(rows[index].ids) > length]
    return dropped, cut


def _encode(
    conversations: Sequence[Sequence[Message]],
    tokenizer: Tokenizer,
    render: Renderer,
    learn: Learn,
    where: Sequence[str],
    replacements: Sequence[Sequence[str]] = (),
) -> list[_Row]:
    rows = []
    renderings = render.render(conversations, where)
    for index, own in enumerate(replacements):
        if own:
            renderings[index] = with_images(renderings[index], own, where[index])
    for rendering, tokens in zip(renderings, tokenize(renderings, tokenizer), strict=True):
        # The template's `bos` token is the only one, if it writes one.
        missing = tokenizer.add_bos and tokenizer.bos_id is not None and tokens.ids[:1] != [tokenizer.bos_id]
        opening = [tokenizer.bos_id] if missing and tokenizer.bos_id is not None else []
        learned: list[tuple[int, int]] = []
        for first, last in rendering.learned:
            if learn == "last" and first < rendering.last:
                continue
            # A token that is learned in part is learned.
            start, stop = (len(opening) + n for n in (tokens.ending_after(first), tokens.starting_from(last)))
            if learned and start <= learned[-1][1]:
                start = learned.pop()[0]
            learned.append((start, stop))
        rows.append(_Row([*opening, *tokens.ids], learned, rendering, tokens, len(opening)))
    return rows


def _exchanges(messages: Sequence[Message]) -> list[int]:
    """Where exchanges start: messages of the user that follow none of the user."""
    roles = [message["role"] for message in messages]
    return [n for n, role in enumerate(roles) if role == "user" and (n == 0 or roles[n - 1] != "user")]


def _exchanges_to_drop(row: _Row, starts: Sequence[int], length: int) -> int:
    """How many exchanges make up what is too much, by their tokens; at least one, and never the last."""
    places = {piece.message: row.inside(piece)[0] for piece in reversed(row.rendering.pieces)}
    if starts[0] not in places:
        return 1  # a blank message has no place
    needed = places[starts[0]] + len(row.ids) - length
    enough = (n for n, start in enumerate(starts) if n and places.get(start, 0) >= needed)
    return next(enough, len(starts) - 1)


def _cut(row: _Row, messages: Sequence[Message], length: int, on_long_answer: str, where: str) -> _Row:
    pieces = [p for p in row.rendering.pieces if messages[p.message]["role"] not in ("system", "assistant")]
    start, stop = max((row.inside(piece) for piece in pieces), key=lambda range_: range_[1] - range_[0], default=(0, 0))
    excess = len(row.ids) - length
    if excess < stop - start:
        removed = excess
    elif on_long_answer == "cut":
        removed = max(0, stop - start - max(1, length // 4))
    else:
        raise UserError(
            f"{where}: the last exchange has {len(row.ids) - max(0, stop - start - 1)} tokens with one of the user's "
            f"text; a conversation may have {length} (data.prompt_length + data.answer_length); raise them, or set "
            "data.on_long_answer to cut"
        )
    ids = [*row.ids[:start], *row.ids[start + removed :]][:length]
    moved = ((first - removed, last - removed) if first >= start else (first, last) for first, last in row.learned)
    learned = [(first, min(last, length)) for first, last in moved if first < length]
    if not learned:
        raise UserError(
            f"{where}: the messages before the first answer that is learned fill all {length} tokens of a conversation "
            "(data.prompt_length + data.answer_length, or prompt_length alone where an answer is asked for); raise them"
        )
    return row._replace(ids=ids, learned=learned)


def _runs(learned: Sequence[tuple[int, int]], count: int) -> list[int]:
    """Lengths of alternating runs, see `EncodedConversations`."""
    bounds = [0, *(place for range_ in learned for place in range_)]
    if bounds[-1] < count:
        bounds.append(count)
    return [stop - start for start, stop in itertools.pairwise(bounds)]
