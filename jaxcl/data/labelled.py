"""Labelled texts as token rows, for end tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxcl.data.plan import Shape
from jaxcl.data.rows import Noise, Ragged, Row, Rows, blank, place
from jaxcl.data.spec import DataConfig
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError


class LabelledRows(Rows):
    """Texts, or pairs of texts, with a class each.

    The text comes first, then the model's separator and the second text, in one segment; for encoders with several
    token types the second text has its own (`Tokenizer.pair_type`). Where both are too long, the longer one loses its
    right part first. `labels` is the class; `weights` is 1 for an example and 0 for a filler row (one scored position a
    row, which carries no token).

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
          texts: rows with `text`, `label` and perhaps `pair`.
          labels: class names.
          tokenizer: the model's tokenizer.
          config: `length` is used.
          masked: for an encoder, which opens a row with its `cls` token; otherwise for a decoder.
          task: index of the task.
          name: its name, with the split, for messages.
          token_types: how many the model knows; with 1, batches carry none.

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
        self.tokens = Ragged(self._encode(texts, tokenizer, masked))
        lengths = self.tokens.lengths
        self.sizes: Int[np.ndarray, "examples 2"] = np.stack([lengths, np.ones_like(lengths)], axis=1)

    def _encode(self, texts: Sequence[Mapping[str, str]], tokenizer: Tokenizer, masked: bool) -> list[list[int]]:
        before, after = tokenizer.frame(masked)
        separator = tokenizer.pair_separator if masked else tokenizer.encode("\n", continued=True)
        firsts = tokenizer.encode_batch([row["text"] for row in texts])
        # An encoder's second text starts afresh behind its separator; a decoder's goes on in the same text.
        seconds = tokenizer.encode_batch([row.get("pair", "") for row in texts], continued=not masked)
        rows = []
        for first, second in zip(firsts, seconds, strict=True):
            between = separator if second else []
            room = self.config.length - len(before) - len(between) - len(after)
            keep_second = min(len(second), max(room - len(first), room // 2))
            keep_first = min(len(first), room - keep_second)
            self.cut += keep_first + keep_second < len(first) + len(second)
            row = before + first[:keep_first] + between
            # With no second text the closing separator is the first one's.
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

    def row(self, index: int, shape: Shape, noise: Noise) -> Row:
        """One row, see the class; `noise` is not used."""
        row = blank(shape, self.pad_id)
        row["labels"] = np.int32(0)
        if self._pair_type > 0:
            row["types"] = np.zeros(shape.length, np.int32)
        if index >= 0:
            stop = place(row, [self.tokens[index]])
            if self._pair_type > 0:
                row["types"][self._seconds[index] : stop] = self._pair_type
            row["labels"] = self.ids[index]
            row["weights"][0] = 1
        return row

    def describe(self) -> dict[str, Any]:
        """Examples, tokens, cut examples and examples of each class."""
        counts = np.bincount(self.ids, minlength=len(self.labels))
        return {
            "examples": len(self),
            "tokens": int(self.sizes[:, 0].sum()),
            "cut_examples": int(self.cut),
            "labels": {label: int(count) for label, count in zip(self.labels, counts, strict=True)},
        }
