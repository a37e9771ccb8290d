"""Prompt-answer pairs as token rows, split at the same token boundary in training and in generation.

Trailing spaces of a prompt are dropped, and the answer starts with one space, or with none after a line break. Prompt
and answer are tokenised separately, so the answer's first token never depends on the prompt: a prompt that ends in
`Output: `, followed by `POS`, gives `Output` `:` and ` POS`, whether the answer is known or generated.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Int

from jaxcl.data.cache import Cache
from jaxcl.data.encode import Encoder, NumberedRows, Texts, batched, encode_rows
from jaxcl.data.examples import Shard, token_type
from jaxcl.data.images.processor import IMAGE
from jaxcl.data.images.seen import Pixels, flat, look
from jaxcl.data.images.tokens import encode_seen, image_index, images_key
from jaxcl.data.plan import Shape, choose_lengths
from jaxcl.data.ragged import Ragged
from jaxcl.data.rows import EncodedRows, Noise, RowFields, blank, place
from jaxcl.data.spec import TEMPLATES, DataConfig
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError

# Marks of chat templates: special tokens of their models. `[INST]` is plain text for Llama 2.
_MARK = re.compile(
    r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>|</?s>|<(?:bos|eos|sep|cls|pad|mask|start_of_turn|end_of_turn)>"
)


class EncodedPrompts(NamedTuple):
    """Prompts as token ids, how many of them were cut on the left, and the tiles of their images."""

    ids: list[list[int]]
    cut: int
    pixels: list[Pixels | None]


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    config: DataConfig,
    where: Callable[[int], str] = lambda index: f"prompt {index + 1}",
) -> EncodedPrompts:
    """Token ids of prompts up to the answer; training and generation both use this.

    The template is put around each prompt. A prompt that is too long is cut on the left; the template and the bos
    token are kept.

    Args:
      prompts: the prompts, without the template.
      tokenizer: the model's tokenizer.
      config: `prompt_length` and `template` are used.
      where: what the prompt of an index is called in messages.

    Raises:
      UserError: the template alone fills `prompt_length`, or the tokenizer lacks one of its marks; an image cannot be
        decoded, or would be cut.
    """
    head_text, tail_text = _template(config)
    check_marks(tokenizer, head_text + tail_text)
    # In running text, a space belongs to the word after it: that before the prompt is tokenised with the prompt.
    head_kept = head_text.rstrip(" \t")
    gap = head_text[len(head_kept) :]
    head = tokenizer.encode(head_kept, specials=True) if head_kept else []
    if tokenizer.add_bos and tokenizer.bos_id is not None and head[:1] != [tokenizer.bos_id]:
        head = [tokenizer.bos_id, *head]
    tail = tokenizer.encode(tail_text.rstrip(" \t"), continued=True, specials=True) if tail_text else []
    room = config.prompt_length - len(head) - len(tail)
    if room < 1:
        raise UserError(
            f"data.template takes {len(head) + len(tail)} tokens and leaves no room for the prompt; "
            f"data.prompt_length is {config.prompt_length}"
        )
    seen = [look([_body(gap + prompt)], tokenizer.images, where(index)) for index, prompt in enumerate(prompts)]
    bodies = tokenizer.encode_batch([one.texts[0] for one in seen], continued=bool(head_kept))
    for index, one in enumerate(seen):
        if one.replacements:
            bodies[index] = encode_seen(one, tokenizer, bool(head_kept))
            if len(bodies[index]) > room:
                raise UserError(
                    f"{where(index)}: the prompt has {len(bodies[index])} tokens with its images, and one with "
                    f"images is not cut; data.prompt_length leaves room for {room}; raise it"
                )
    cut = sum(len(body) > room for body in bodies)
    ids = [head + body[-room:] + tail for body in bodies]
    # The first answer token needs a position that predicts it, so an empty prompt has one token, too.
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    ids = [row or [tokenizer.pad_id if start is None else start] for row in ids]
    return EncodedPrompts(ids, cut, [one.pixels for one in seen])


def open_prompts(beginnings: Sequence[str], tokenizer: Tokenizer, config: DataConfig) -> list[list[int]]:
    """Token ids of unfinished prompts: the template up to the prompt, and the prompt's beginning."""
    head, _ = _template(config)
    return encode_prompts(beginnings, tokenizer, config.model_copy(update={"template": head + "{prompt}"})).ids


def encode_answers(
    answers: Sequence[str], prompts: Sequence[str], tokenizer: Tokenizer, config: DataConfig
) -> list[list[int]]:
    """Token ids of answers as continuations of their prompts, without the end token.

    Args:
      answers: the answers; surrounding white space is dropped.
      prompts: the prompt of each answer.
      tokenizer: the model's tokenizer.
      config: `template` is used.
    """
    _, tail = _template(config)
    texts = []
    for answer, prompt in zip(answers, prompts, strict=True):
        before = (_body(prompt) + tail).rstrip(" \t")
        texts.append(("" if before.endswith("\n") else " ") + answer.strip())
    return tokenizer.encode_batch([text if text.strip() else "" for text in texts], continued=True)


def check_marks(tokenizer: Tokenizer, template: str) -> None:
    """Checks that the marks of a template, such as `<|im_start|>` or `<s>`, are single tokens.

    Raises:
      UserError: the tokenizer would spell some of them out.
    """
    marks = dict.fromkeys(_MARK.findall(template))
    missing = [mark for mark in marks if len(tokenizer.encode(mark, continued=True, specials=True)) != 1]
    if missing:
        raise UserError(
            f"data.template: the tokenizer has no token for {', '.join(missing)}, and would spell it out; allowed are "
            "templates of the model that the tokenizer belongs to, or without such marks"
        )


def _template(config: DataConfig) -> tuple[str, str]:
    head, _, tail = TEMPLATES.get(config.template, config.template).partition("{prompt}")
    return head, tail


def _body(prompt: str) -> str:
    return prompt.rstrip(" \t")


class PairEncoder:
    """Prompt-answer pairs to token sequences of two spans, prompt and answer; see `PairRows`."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, name: str) -> None:
        if tokenizer.eos_id is None:
            raise UserError("the tokenizer has no end token (eos), which prompt-answer tasks need")
        self._tokenizer = tokenizer
        self._config = config
        self._name = name
        self.dtype = token_type(tokenizer.vocab_size)
        options = ("prompt_length", "answer_length", "template", "on_long_answer")
        self.key: Mapping[str, Any] = {
            "kind": "pairs",
            "tokenizer": tokenizer.fingerprint,
            **{one: getattr(config, one) for one in options},
            **images_key(tokenizer),
        }

    def shards(self, rows: NumberedRows) -> Iterator[Shard]:
        """The examples of pairs; see `Encoder.shards`.

        Raises:
          UserError: an answer is longer than `answer_length`; names the first one, after all rows were read.
        """
        long: list[tuple[int, int]] = []
        count = 0
        for batch in batched(rows):
            count += len(batch)
            shard = self._shard(batch, long)
            if not long or self._config.on_long_answer == "cut":
                yield shard
        if long and self._config.on_long_answer == "error":
            number, length = long[0]
            raise UserError(
                f"{self._name} row {number + 1}: the answer has {length} tokens with its end token, "
                f"data.answer_length is {self._config.answer_length} ({len(long)} of {count} answers are longer); "
                "raise it, or set data.on_long_answer to cut"
            )

    def _shard(self, batch: Sequence[tuple[int, Mapping[str, str]]], long: list[tuple[int, int]]) -> Shard:
        prompts = [row["prompt"] for _, row in batch]
        encoded = encode_prompts(
            prompts, self._tokenizer, self._config, lambda index: f"{self._name} row {batch[index][0] + 1}"
        )
        answers = encode_answers([row["answer"] for _, row in batch], prompts, self._tokenizer, self._config)
        closed = [[*answer, cast(int, self._tokenizer.eos_id)] for answer in answers]
        limit = self._config.answer_length
        over = [(number, len(answer)) for (number, _), answer in zip(batch, closed, strict=True) if len(answer) > limit]
        long += over
        closed = [answer[:limit] for answer in closed]
        tokens = Ragged.of([prompt + answer for prompt, answer in zip(encoded.ids, closed, strict=True)], self.dtype)
        spans = Ragged.of([(len(prompt), len(answer)) for prompt, answer in zip(encoded.ids, closed, strict=True)])
        pixels = None if self._tokenizer.images is None else flat(encoded.pixels)
        return Shard(tokens, spans, {"cut_prompts": encoded.cut, "cut_answers": len(over)}, pixels)


class PairRows(EncodedRows):
    """Encoded prompt-answer pairs; only the answer and its end token are scored.

    A row is prompt, answer, end token and padding on the right. `predict` holds the positions that predict the answer's
    tokens, `targets` these tokens.

    Attributes:
      table: tokens per example, and the lengths of prompt and answer, end token included.
      cut_prompts: number of prompts cut on the left.
      cut_answers: number of answers cut on the right (only with `on_long_answer: cut`).
    """

    group = "pairs"

    def __init__(
        self,
        texts: Texts,
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        task: int,
        name: str,
        prompt_prefix: Sequence[int] = (),
        cache: Cache | None = None,
    ) -> None:
        """Encodes all pairs.

        Args:
          texts: rows with `prompt` and `answer`, or examples that are encoded already.
          tokenizer: the model's tokenizer; needs an end token.
          config: lengths, template and buckets are used.
          task: index of the task.
          name: name of task and split, for messages.
          prompt_prefix: token ids before every prompt, not counted in `prompt_length`; see `Method.prompt_prefix`.
          cache: where streamed rows are encoded; see `encode_rows`.

        Raises:
          UserError: an answer is longer than `answer_length`, or the tokenizer has no end token.
        """
        self.task = task
        self.name = name
        self.config = config
        self.pad_id = tokenizer.pad_id
        self.images = tokenizer.images
        self.image_id = None if self.images is None else tokenizer.backend.token_to_id(IMAGE)
        self._prefix: Int[np.ndarray, " prefix"] = np.asarray(prompt_prefix, np.int32)
        self.table = encode_rows(texts, self._encoder(tokenizer), cache)
        self.cut_prompts = self.table.count("cut_prompts")
        self.cut_answers = self.table.count("cut_answers")

    def _encoder(self, tokenizer: Tokenizer) -> Encoder:
        return PairEncoder(tokenizer, self.config, self.name)

    @functools.cached_property
    def sizes(self) -> Int[np.ndarray, "examples 2"]:
        """Tokens, and tokens of the answer with its end token, per example."""
        return np.stack([self.table.lengths + len(self._prefix), self.table.every_second_span()], axis=1)

    @functools.cached_property
    def tiles(self) -> Int[np.ndarray, " examples"]:
        """Tiles of images per example."""
        return self.table.pixel_bytes // (1 if self.images is None else 3 * self.images.tile**2)

    def prompt(self, index: int) -> Int[np.ndarray, " tokens"]:
        """Tokens before the first token that is learned."""
        tokens, spans = self.table[index]
        return np.concatenate([self._prefix, tokens[: spans[0]].astype(np.int32)])

    def answer(self, index: int) -> Int[np.ndarray, " tokens"]:
        """The tokens of the last span that is learned, end token included."""
        return self.table.last_learned(index).astype(np.int32)

    def shapes(self, others: Sequence[PairRows]) -> list[Shape]:
        """See `pair_shapes`."""
        return pair_shapes([self, *others], self.config)

    def row(self, index: int, shape: Shape, noise: Noise) -> RowFields:
        """One row, see `EncodedRows.row`; `noise` is not used."""
        row = blank(shape, self.pad_id)
        if shape.images:
            self._show(row, index, shape)
        if index < 0:
            return row
        tokens, at = self.learned(index)
        place(row, tokens, np.array([len(tokens)]))
        if shape.images:
            row["image_index"][: len(tokens)] = image_index(tokens, self.image_id)
        row["predict"][: len(at)] = at - 1
        row["targets"][: len(at)] = tokens[at]
        row["weights"][: len(at)] = 1
        return row

    def _show(self, row: RowFields, index: int, shape: Shape) -> None:
        """Adds the tiles of an example."""
        if self.images is None:
            raise ValueError(f"shape: {self.name} has no images, got {shape}")
        tile = self.images.tile
        row["pixels"] = np.zeros((shape.images, tile, tile, 3), np.uint8)
        row["image_index"] = np.full(shape.length, -1, np.int32)
        if index >= 0:
            own = self.table.pixels(index)
            if len(own) > row["pixels"].size:
                raise UserError(f"{self.name}: an example has more images than any example of tasks with data")
            row["pixels"].reshape(-1)[: len(own)] = own

    def learned(self, index: int) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " learned"]]:
        """The tokens of an example, and the places of those that are learned."""
        tokens, spans = self.table[index]
        tokens = np.concatenate([self._prefix, tokens]) if len(self._prefix) else tokens
        ends = len(self._prefix) + np.cumsum(spans, dtype=np.int64)
        scored = [np.arange(start, stop) for start, stop in zip(ends[::2], ends[1::2], strict=False)]
        at = scored[0] if len(scored) == 1 else np.concatenate(scored)
        return tokens, at[at > 0]  # no position predicts the first token

    def describe(self) -> dict[str, Any]:
        """Examples, tokens, scored tokens and cut examples."""
        return {
            "examples": len(self),
            "tokens": self.total,
            "scored_tokens": int(self.sizes[:, 1].sum()),
            "cut_prompts": self.cut_prompts,
            "cut_answers": self.cut_answers,
        }


def pair_shapes(rows: Sequence[EncodedRows], config: DataConfig) -> list[Shape]:
    """A few shapes for all examples of `rows`; given the rows of all tasks, the tasks share their compiled steps.

    Args:
      rows: encoded pairs of all tasks and splits that share the shapes.
      config: `buckets`, `bucket_lengths` and `length_multiple` are used.

    Returns:
      Shapes that increase in both numbers, so that what fits one fits the next.

    Raises:
      UserError: the longest example exceeds the given `bucket_lengths`.
    """
    return shapes_for(np.concatenate([one.sizes for one in rows]), config, np.concatenate([*map(tiles_of, rows)]))


def tiles_of(rows: EncodedRows) -> Int[np.ndarray, " examples"]:
    """Tiles of images per example of pairs, or of several sources of them."""
    none = np.zeros(0, np.int64)
    return np.concatenate([none, *(leaf.tiles for leaf in rows.leaves() if isinstance(leaf, PairRows))])


def shapes_for(
    sizes: Int[np.ndarray, "examples 2"], config: DataConfig, tiles: Int[np.ndarray, " examples"] | None = None
) -> list[Shape]:
    """The shapes of `pair_shapes`, given the sizes of all examples.

    Args:
      sizes: tokens and scored tokens of each example.
      config: see `pair_shapes`.
      tiles: tiles of images of each example; none: no images.

    Raises:
      UserError: see `pair_shapes`.
    """
    if config.bucket_lengths == "auto":
        lengths = choose_lengths(sizes[:, 0], config.buckets, config.length_multiple)
    else:
        lengths = config.bucket_lengths
        longest = int(sizes[:, 0].max())
        if longest > lengths[-1]:
            raise UserError(
                f"data.bucket_lengths ends at {lengths[-1]}, the longest example has {longest} tokens "
                f"(prompt_length + answer_length allows {config.prompt_length + config.answer_length})"
            )
    shapes = []
    for length in lengths:
        scored = sizes[sizes[:, 0] <= length, 1].max(initial=1)
        images = 0 if tiles is None else tiles[sizes[:, 0] <= length].max(initial=0)
        shapes.append(Shape(int(length), int(scored), int(images)))
    return shapes
