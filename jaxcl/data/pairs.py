"""Prompt-answer pairs as token rows, split at the same token boundary in training and in generation.

Trailing spaces of a prompt are dropped, and the answer starts with one space, or with none after a line break. Prompt
and answer are tokenised separately, so the answer's first token never depends on the prompt: a prompt that ends in
`Output: `, followed by `POS`, gives `Output` `:` and ` POS`, whether the answer is known or generated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxcl.data.plan import Shape, choose_lengths
from jaxcl.data.rows import EncodedRows, Noise, Ragged, RowFields, blank, place
from jaxcl.data.spec import TEMPLATES, DataConfig
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError

# Marks of chat templates: special tokens of their models. `[INST]` is plain text for Llama 2.
_MARK = re.compile(
    r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>|</?s>|<(?:bos|eos|sep|cls|pad|mask|start_of_turn|end_of_turn)>"
)


class EncodedPrompts(NamedTuple):
    """Prompts as token ids, and how many of them were cut on the left."""

    ids: list[list[int]]
    cut: int


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer, config: DataConfig) -> EncodedPrompts:
    """Token ids of prompts up to the answer; training and generation both use this.

    The template is put around each prompt. A prompt that is too long is cut on the left; the template and the bos
    token are kept.

    Args:
      prompts: the prompts, without the template.
      tokenizer: the model's tokenizer.
      config: `prompt_length` and `template` are used.

    Raises:
      UserError: the template alone fills `prompt_length`, or the tokenizer lacks one of its marks.
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
    bodies = tokenizer.encode_batch([_body(gap + prompt) for prompt in prompts], continued=bool(head_kept))
    cut = sum(len(body) > room for body in bodies)
    ids = [head + body[-room:] + tail for body in bodies]
    # The first answer token needs a position that predicts it, so an empty prompt has one token, too.
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    return EncodedPrompts([row or [tokenizer.pad_id if start is None else start] for row in ids], cut)


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


class PairRows(EncodedRows):
    """Encoded prompt-answer pairs; only the answer and its end token are scored.

    A row is prompt, answer, end token and padding on the right. `predict` holds the positions that predict the answer's
    tokens, `targets` these tokens.

    Attributes:
      texts: the pairs as given.
      prompts: prompt tokens per example.
      answers: answer tokens per example, end token included.
      cut_prompts: number of prompts cut on the left.
      cut_answers: number of answers cut on the right (only with `on_long_answer: cut`).
    """

    group = "pairs"

    def __init__(
        self,
        texts: Sequence[Mapping[str, str]],
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        task: int,
        name: str,
        prompt_prefix: Sequence[int] = (),
    ) -> None:
        """Encodes all pairs.

        Args:
          texts: rows with `prompt` and `answer`.
          tokenizer: the model's tokenizer; needs an end token.
          config: lengths, template and buckets are used.
          task: index of the task.
          name: name of task and split, for messages.
          prompt_prefix: token ids before every prompt, not counted in `prompt_length`; see `Method.prompt_prefix`.

        Raises:
          UserError: an answer is longer than `answer_length`, or the tokenizer has no end token.
        """
        if tokenizer.eos_id is None:
            raise UserError("the tokenizer has no end token (eos), which prompt-answer tasks need")
        self.texts = texts
        self.task = task
        self.name = name
        self.config = config
        self.pad_id = tokenizer.pad_id
        prompts = [row["prompt"] for row in texts]
        encoded = encode_prompts(prompts, tokenizer, config)
        answers = encode_answers([row["answer"] for row in texts], prompts, tokenizer, config)
        closed = [[*answer, tokenizer.eos_id] for answer in answers]
        over = [index for index, answer in enumerate(closed) if len(answer) > config.answer_length]
        if over and config.on_long_answer == "error":
            raise UserError(
                f"{name} row {over[0] + 1}: the answer has {len(closed[over[0]])} tokens with its end token, "
                f"data.answer_length is {config.answer_length} ({len(over)} of {len(texts)} answers are longer); "
                "raise it, or set data.on_long_answer to cut"
            )
        self.cut_prompts = encoded.cut
        self.cut_answers = len(over)
        self.prompts = Ragged([*prompt_prefix, *ids] for ids in encoded.ids)
        self.answers = Ragged(answer[: config.answer_length] for answer in closed)
        self.sizes: Int[np.ndarray, "examples 2"] = np.stack(
            [self.prompts.lengths + self.answers.lengths, self.answers.lengths], axis=1
        )

    def shapes(self, others: Sequence[PairRows]) -> list[Shape]:
        """See `pair_shapes`."""
        return pair_shapes([self, *others], self.config)

    def row(self, index: int, shape: Shape, noise: Noise) -> RowFields:
        """One row, see `EncodedRows.row`; `noise` is not used."""
        row = blank(shape, self.pad_id)
        if index < 0:
            return row
        prompt, answer = self.prompts[index], self.answers[index]
        place(row, [np.concatenate([prompt, answer])])
        count = len(answer)
        row["predict"][:count] = np.arange(len(prompt) - 1, len(prompt) + count - 1)
        row["targets"][:count] = answer
        row["weights"][:count] = 1
        return row

    def describe(self) -> dict[str, Any]:
        """Examples, tokens, scored tokens and cut examples."""
        return {
            "examples": len(self),
            "tokens": int(self.sizes[:, 0].sum()),
            "scored_tokens": int(self.sizes[:, 1].sum()),
            "cut_prompts": self.cut_prompts,
            "cut_answers": self.cut_answers,
        }


def pair_shapes(rows: Sequence[PairRows], config: DataConfig) -> list[Shape]:
    """A few shapes for all examples of `rows`; given the rows of all tasks, the tasks share their compiled steps.

    Args:
      rows: encoded pairs of all tasks and splits that share the shapes.
      config: `buckets`, `bucket_lengths` and `length_multiple` are used.

    Returns:
      Shapes that increase in both numbers, so that what fits one fits the next.

    Raises:
      UserError: the longest example exceeds the given `bucket_lengths`.
    """
    sizes = np.concatenate([one.sizes for one in rows])
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
        shapes.append(Shape(int(length), min(int(scored), config.answer_length)))
    return shapes
