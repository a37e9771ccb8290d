"""Words of a text in any script, for metrics that compare words."""

from __future__ import annotations

import functools
import unicodedata
from typing import Any

import regex

# Scripts without spaces between words: a character with its signs is a word.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# A letter or digit (`regex` counts signs and joiners of a word as \w, and some numbers as neither).
_LETTER = rf"[[\w\p{{N}}]--[_{_UNSPACED}]]"
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|{_LETTER}+", flags=regex.V1)
_TOKEN = regex.compile(r"[\w\p{N}]+|[^\w\p{N}\s]")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; letters of English words are those of rouge-score, stems included.

    Signs that belong to a letter, such as vowel signs of Indic and Thai scripts, stay with it, and it makes no
    difference whether an accented letter is written as one character or two.

    >>> words("Running, die Grüße; 东京!")
    ['run', 'die', 'grüße', '东', '京']
    """
    found: list[str] = []
    for word in _WORD.findall(unicodedata.normalize("NFC", text).lower()):
        found += _english().tokenize(word) if word.isascii() else [word]
    return found


def tokens(text: str) -> list[str]:
    """Lower-case words and marks of punctuation, each by itself.

    >>> tokens("Yes, 2 कि.")
    ['yes', ',', '2', 'कि', '.']
    """
    return _TOKEN.findall(unicodedata.normalize("NFC", text).lower())


@functools.cache
def _english() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)
