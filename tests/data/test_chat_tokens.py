"""Which tokens hold which characters."""

from __future__ import annotations

import functools

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from jaxcl.data.chat_rendering import Rendering
from jaxcl.data.chat_tokens import tokenize
from jaxcl.data.tokenizer import Tokenizer
from tests.tiny.texts import small_tokenizer

PARTS = st.sampled_from([" ", "  ", "\n", "review", "of ", " moving", "é", "日本", "🙂", "0"])


@functools.cache
def trimming_tokenizer() -> Tokenizer:
    """Its places leave out spaces, as those of Llama 3 do, so that some tokens have none."""
    backend = Backend.from_str(small_tokenizer().backend.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return Tokenizer(backend, {"pad": 0}, add_bos=False)


@given(st.lists(PARTS, max_size=8).map("".join), st.booleans())
def test_tokens_by_place(text: str, hidden: bool) -> None:
    tokenizer = trimming_tokenizer()
    (encoding,) = tokenizer.backend.encode_batch([text], add_special_tokens=False)
    # A list of places is made only for texts with something hidden.
    marks = {"\ufdd00\ufdd0": "<bos>"} if hidden else {}
    (tokens,) = tokenize([Rendering(text, [], [], 0, marks)], tokenizer)
    assert tokens.ids == encoding.ids
    count = len(tokens.ids)
    for char in range(len(text) + 1):
        ending = [n for n, (_, stop) in enumerate(encoding.offsets) if stop > char]
        starting = [n for n, (start, _) in enumerate(encoding.offsets) if start >= char]
        assert tokens.ending_after(char) == min(ending, default=count)
        assert tokens.starting_from(char) == min(starting, default=count)
