"""Conversations as token rows, and the prompts that a model answers in them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxcl.data.chat_templates import find_template
from jaxcl.data.conversations import encode_conversations
from jaxcl.data.encode import Encoder, NumberedRows, batched
from jaxcl.data.examples import Shard, token_type
from jaxcl.data.images.seen import flat
from jaxcl.data.images.tokens import images_key
from jaxcl.data.messages import Message
from jaxcl.data.pairs import EncodedPrompts, PairRows
from jaxcl.data.ragged import Ragged
from jaxcl.data.spec import DataConfig
from jaxcl.data.tokenizer import Tokenizer

# The answer where there is none yet.
_NO_ANSWER: Message = {"role": "assistant", "content": "."}


def messages_of(row: Mapping[str, str]) -> list[Message]:
    """The messages of a row: those in its prompt, a JSON list, and its answer."""
    return [*json.loads(row["prompt"]), {"role": "assistant", "content": row["answer"]}]


def encode_openings(
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    config: DataConfig,
    where: Callable[[int], str] = lambda index: f"conversation {index + 1}",
) -> EncodedPrompts:
    """Token ids of conversations up to the answer that a model is to give.

    Args:
      prompts: a JSON list of messages each.
      tokenizer: the model's tokenizer.
      config: `prompt_length` and `chat_template` are used.
      where: what the conversation of an index is called in messages.

    Raises:
      UserError: see `encode_conversations`.
    """
    found = encode_conversations(
        [[*json.loads(prompt), _NO_ANSWER] for prompt in prompts],
        tokenizer,
        length=config.prompt_length,
        learn="last",
        where=where,
        template=config.chat_template,
        on_long_answer="cut",
        marks=False,  # they may enclose the generation prompt
    )
    ids = [ids[: spans[0]] for ids, spans in zip(found.ids, found.spans, strict=True)]
    return EncodedPrompts(ids, found.cut, found.pixels)


class ChatEncoder:
    """Conversations to token sequences with the spans that are learned; see `encode_conversations`."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, name: str) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._name = name
        self.dtype = token_type(tokenizer.vocab_size)
        self.key: Mapping[str, Any] = {
            "kind": "chat",
            "tokenizer": tokenizer.fingerprint,
            "special_tokens": dict(tokenizer.special_tokens),
            "template": find_template(config.chat_template, tokenizer),
            "length": config.prompt_length + config.answer_length,
            "learn": config.learn,
            "on_long_answer": config.on_long_answer,
            **images_key(tokenizer),
        }

    def shards(self, rows: NumberedRows) -> Iterator[Shard]:
        """The examples of conversations; see `Encoder.shards`."""
        for batch in batched(rows):
            found = encode_conversations(
                [messages_of(row) for _, row in batch],
                self._tokenizer,
                length=self._config.prompt_length + self._config.answer_length,
                learn=self._config.learn,
                where=functools.partial(self._place, batch),
                template=self._config.chat_template,
                on_long_answer=self._config.on_long_answer,
            )
            counts = {"dropped_turns": found.dropped_turns, "cut_prompts": found.cut}
            pixels = None if self._tokenizer.images is None else flat(found.pixels)
            yield Shard(Ragged.of(found.ids, self.dtype), Ragged.of(found.spans), counts, pixels)

    def _place(self, batch: Sequence[tuple[int, Mapping[str, str]]], index: int) -> str:
        return f"{self._name} row {batch[index][0] + 1}"


class ChatRows(PairRows):
    """Encoded conversations, of which the assistant's answers are scored; batched together with pairs."""

    def _encoder(self, tokenizer: Tokenizer) -> Encoder:
        return ChatEncoder(tokenizer, self.config, self.name)

    def describe(self) -> dict[str, Any]:
        """Those of `PairRows`, and the old turns that were left out."""
        return {**super().describe(), "dropped_turns": self.table.count("dropped_turns")}
