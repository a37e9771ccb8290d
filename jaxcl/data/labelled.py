"""Labelled texts as token rows, for end tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxcl.data.plan import Shape
from jaxcl.data.ragged import Ragged
from jaxcl.data.rows import EncodedRows, Noise, RowFields, blank, place
from jaxcl.data.spec import DataConfig
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError


class LabelledRows(EncodedRows):
    """Texts, or pairs of texts, each with a class.

    A row is the text, the model's separator and the second text, in one segment. Encoders with several token types see
    the second text with its own type (`Tokenizer.pair_type`). If the two are too long, the longer one is cut first, on
    the right. `labels` is the class. A row has one scored position, which carries no token: its `weights` is 1 for an
    example and 0 for a filler row.

    Attributes:
      labels: class names; an example's label is the index into them.
      cut: examples that lost some text.
    """

    group = "labelled"

    def __init__(
        self,
        texts: Sequence[Mapping[str, str]],
        labels: Sequence[str],
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        masked: bool,
        task: int,
        name: str,
        token_types: int = 1,
    ) -> None:
        """Encodes all texts.

        Args:
          texts: rows with `text`, `label` and optionally `pair`.
          labels: class names.
          tokenizer: the model's tokenizer.
          config: `length` is used.
          masked: encode for an encoder, whose rows start with its `cls` token; else for a decoder.
          task: index of the task.
          name: name of task and split, for messages.
          token_types: number of token types of the model; with 1, batches have no `types`.

        Raises:
          UserError: a label is not among `labels`.
        """
        self.labels = tuple(labels)
        self.task = task
        self.name = name
        self.config = config
        self.pad_id = tokenizer.pad_id
        self.cut = 0
        known = {label: index for index, label in enumerate(self.labels)}
        for number, row in enumerate(texts, 1):
            if row["label"] not in known:
                raise UserError(f"{name} row {number}: label {row['label']!r} is not one of {', '.join(self.labels)}")
        self.ids: Int[np.ndarray, " examples"] = np.array([known[row["label"]] for row in texts], np.int32)
        self._pair_type = min(tokenizer.pair_type, token_types - 1) if masked else 0
        self._seconds: list[int] = []
        self.tokens = Ragged.of(self._encode(texts, tokenizer, masked))

    @property
    def sizes(self) -> Int[np.ndarray, "examples 2"]:
        """Tokens per example; one position is scored."""
        lengths = self.tokens.lengths
        return np.stack([lengths, np.ones_like(lengths)], axis=1)

    def _encode(self, texts: Sequence[Mapping[str, str]], tokenizer: Tokenizer, masked: bool) -> list[list[int]]:
        before, after = tokenizer.frame(masked)
        separator = tokenizer.pair_separator if masked else tokenizer.encode("\n", continued=True)
        firsts = tokenizer.encode_batch([row["text"] for row in texts])
        # An encoder's second text is tokenised as a new text, a decoder's as the continuation of the first.
        seconds = tokenizer.encode_batch([row.get("pair", "") for row in texts], continued=not masked)
        rows = []
        for first, second in zip(firsts, seconds, strict=True):
            between = separator if second else []
            room = self.config.length - len(before) - len(between) - len(after)
            keep_second = min(len(second), max(room - len(first), room // 2))
            keep_first = min(len(first), room - keep_second)
            self.cut += keep_first + keep_second < len(first) + len(second)
            row = before + first[:keep_first] + between
            # Without a second text, the final separator belongs to the first text.
            self._seconds.append(len(row) if second else self.config.length)
            rows.append(row + second[:keep_second] + after)
        return rows

    def shapes(self, others: Sequence[LabelledRows]) -> list[Shape]:
        """One shape: `length` tokens and one scored position."""
        for other in others:
            if (other.config.length, other.labels) != (self.config.length, self.labels):
                raise ValueError(
                    f"rows that share batches: expected length and labels of {self.name}, got {other.name}"
                )
        return [Shape(self.config.length, 1)]

    def row(self, index: int, shape: Shape, noise: Noise) -> RowFields:
        """One row, see `EncodedRows.row`; `noise` is not used."""
        row = blank(shape, self.pad_id)
        row["labels"] = np.int32(0)
        if self._pair_type > 0:
            row["types"] = np.zeros(shape.length, np.int32)
        if index >= 0:
            tokens = self.tokens[index]
            stop = place(row, tokens, np.array([len(tokens)]))
            if self._pair_type > 0:
                row["types"][self._seconds[index] : stop] = self._pair_type
            row["labels"] = self.ids[index]
            row["weights"][0] = 1
        return row

    def describe(self) -> dict[str, Any]:
        """Examples, tokens, cut examples and examples per class."""
        counts = np.bincount(self.ids, minlength=len(self.labels))
        return {
            "examples": len(self),
            "tokens": self.total,
            "cut_examples": int(self.cut),
            "labels": {label: int(count) for label, count in zip(self.labels, counts, strict=True)},
        }
