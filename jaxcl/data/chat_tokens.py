"""Tokens of rendered conversations, and which characters they hold."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import tokenizers

from jaxcl.data.chat_rendering import Rendering
from jaxcl.data.tokenizer import Tokenizer

# Texts put before a piece to tokenise it as in mid-text.
_ANCHORS = ("\n", "a")


class Tokens(Protocol):
    """Token ids of a text and their places in it."""

    ids: list[int]

    def ending_after(self, char: int) -> int:
        """Number of the first token that ends after the start of a character."""
        ...

    def starting_from(self, char: int) -> int:
        """Number of the first token that does not start before a character."""
        ...


class _Plain:
    """Tokens as `tokenizers` gives them; to list all their places would take half as long as to find them."""

    def __init__(self, encoding: tokenizers.Encoding, chars: int) -> None:
        self.ids = encoding.ids
        self._encoding = encoding
        self._chars = chars

    def ending_after(self, char: int) -> int:
        found = None
        # Some characters, such as a space before a word, belong to no token.
        near = char
        while found is None and near < self._chars:
            found = self._encoding.char_to_token(near)
            near += 1
        if found is None:
            found = len(self.ids)
        while found > 0 and self._place(found - 1)[1] > char:
            found -= 1
        return found

    def starting_from(self, char: int) -> int:
        found = self.ending_after(char)
        while found < len(self.ids) and self._place(found)[0] < char:
            found += 1
        while found > 0 and self._place(found - 1)[0] >= char:
            found -= 1
        return found

    def _place(self, token: int) -> tuple[int, int]:
        return self._encoding.token_to_chars(token) or (0, 0)


class _Placed:
    """Tokens with a list of their places."""

    def __init__(self, placed: Sequence[_Token]) -> None:
        self.ids = [token.id for token in placed]
        self._starts = [token.start for token in placed]
        self._stops = [token.stop for token in placed]

    def ending_after(self, char: int) -> int:
        return bisect.bisect_right(self._stops, char)

    def starting_from(self, char: int) -> int:
        return bisect.bisect_left(self._starts, char)


class _Token(NamedTuple):
    id: int
    start: int
    stop: int


def tokenize(renderings: Sequence[Rendering], tokenizer: Tokenizer) -> list[Tokens]:
    """The tokens of renderings, by the places in their texts.

    A text is tokenised as a whole, as transformers does. Where messages hold the text of a special token, what lies
    between two special tokens of the template is tokenised on its own, with special tokens spelled out.
    """
    tokenizer.backend.encode_special_tokens = False
    texts = [rendering.text for rendering in renderings]
    found = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
    return [
        _Placed(list(_spelled(rendering, encoding, tokenizer))) if rendering.hidden else _Plain(encoding, len(text))
        for rendering, encoding, text in zip(renderings, found, texts, strict=True)
    ]


def _spelled(rendering: Rendering, encoding: tokenizers.Encoding, tokenizer: Tokenizer) -> Iterator[_Token]:
    """Tokens of a text with marks in place of the texts of special tokens, which are spelled out."""
    added = tokenizer.backend.get_added_tokens_decoder().items()
    marks = re.compile("(" + "|".join(map(re.escape, rendering.hidden)) + ")")
    tokens = [_Token(index, *place) for index, place in zip(encoding.ids, encoding.offsets, strict=True)]
    special = {index: token.content for index, token in added if token.special}
    # The token of unknown characters is special, too, and may come from any text.
    written = [
        number
        for number, token in enumerate(tokens)
        if token.id in special and special[token.id] in rendering.text[token.start : token.stop]
    ]
    first, place = 0, 0
    for number in [*written, len(tokens)]:
        closing = tokens[number : number + 1]
        stop = closing[0].start if closing else len(rendering.text)
        if marks.search(rendering.text, place, stop):
            parts = marks.split(rendering.text[place:stop])
            before = special[tokens[first - 1].id] if first else ""
            yield from _spell(parts, place, rendering.hidden, tokenizer, before)
        else:
            yield from tokens[first:number]
        yield from closing
        first, place = number + 1, closing[0].stop if closing else stop


def _spell(
    parts: Sequence[str], place: int, hidden: dict[str, str], tokenizer: Tokenizer, before: str
) -> Iterator[_Token]:
    """Tokens of what alternating texts and marks stand for, after a special token or, if it is empty, at the start."""
    text = ""
    places = []
    for part in parts:
        shown = hidden.get(part, part)
        # All of a hidden text but its first character is inside its mark.
        places += [place + (min(n, 1) if part in hidden else n) for n in range(len(shown))]
        text += shown
        place += len(part)
    places.append(place)
    anchor = _anchor(tokenizer.backend, before, text)
    tokenizer.backend.encode_special_tokens = True
    skipped = len(tokenizer.backend.encode(anchor, add_special_tokens=False).ids)
    encoding = tokenizer.backend.encode(anchor + text, add_special_tokens=False)
    for index, (start, stop) in itertools.islice(zip(encoding.ids, encoding.offsets, strict=True), skipped, None):
        yield _Token(index, *(places[max(0, char - len(anchor))] for char in (start, stop)))


def _anchor(backend: tokenizers.Tokenizer, before: str, text: str) -> str:
    """What to put before a text so that it has the tokens that it has after a special token.

    Tokenizers of the sentencepiece kind put a space before every text, and some of them after every special token.
    """
    backend.encode_special_tokens = False
    alone, after = (backend.encode(before * count + "a", add_special_tokens=False).ids for count in (0, 1))
    if not before or after[1:] == alone:
        return ""
    backend.encode_special_tokens = True
    for anchor in _ANCHORS:
        opening, both = (backend.encode(anchor + more, add_special_tokens=False).ids for more in ("", text))
        if both[: len(opening)] == opening:
            return anchor
    return ""
