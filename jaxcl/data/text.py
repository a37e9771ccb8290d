"""Running text as token rows, packed or one passage per row, for causal and masked language models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Int

from jaxcl.data.plan import Shape
from jaxcl.data.rows import EncodedRows, Noise, Ragged, RowFields, blank, place
from jaxcl.data.spec import DataConfig
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError

Objective = Literal["causal", "masked"]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs pieces into few rows by best-fit decreasing.

    Long pieces go first, each into the fullest row that still has room. The result depends only on the lengths, so all
    processes have the same rows, and an iterator's position in them is one number.

    Args:
      lengths: tokens per piece, from 1 to `capacity`.
      capacity: tokens per row.

    Returns:
      The indices of the pieces in each row.

    >>> pack([3, 5, 2, 4], capacity=7)
    [[1, 2], [3, 0]]
    """
    rows: list[list[int]] = []
    free: list[list[int]] = [[] for _ in range(capacity + 1)]  # free[n]: rows with n tokens left
    spaces = 0  # bit n is set if free[n] is not empty
    for piece in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = int(lengths[piece])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = free[space].pop()
            if not free[space]:
                spaces &= ~(1 << space)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = space - length
        if left:
            free[left].append(row)
            spaces |= 1 << left
    return rows


class TextRows(EncodedRows):
    """Passages as rows of `length` tokens.

    Causal: every token except the last of its segment predicts the next one; `predict` is absent. Masked: exactly
    `round(mask_rate * tokens)` of a row's tokens are predicted (at least one; special tokens are neither counted nor
    chosen). By default 80% of them are replaced by the mask token, 10% by a random token, and 10% are unchanged.

    With packing, a row holds several passages as segments that do not attend to each other, and a passage longer than a
    row continues in another. Without, a row holds one passage; one that is too long is cut and counted.

    Attributes:
      pieces: token ids of the pieces that rows are made of.
      rows: indices of the pieces in each row.
      cut: number of passages cut on the right.
      fill: share of the rows' tokens that are not padding.
    """

    group = "text"

    def __init__(
        self,
        texts: Sequence[Mapping[str, str]],
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        objective: Objective,
        task: int,
        name: str,
    ) -> None:
        """Encodes and packs all passages.

        Args:
          texts: rows with `text`.
          tokenizer: the model's tokenizer; a masked objective needs its mask token.
          config: `length`, `packing` and the masking rates are used.
          objective: `causal` for a decoder, `masked` for an encoder.
          task: index of the task.
          name: name of task and split, for messages.

        Raises:
          UserError: the tokenizer has no mask token, or no passage has a token to predict.
        """
        if objective == "masked" and tokenizer.mask_id is None:
            raise UserError("the tokenizer has no mask token, which masked language modelling needs")
        self.objective = objective
        self.task = task
        self.name = name
        self.config = config
        self.pad_id = tokenizer.pad_id
        self.mask_id = tokenizer.mask_id
        ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), list(tokenizer.special_ids))
        self._ordinary = ordinary.astype(np.int32)
        self._is_ordinary = np.isin(np.arange(tokenizer.vocab_size), ordinary)
        self._passages = len(texts)
        self.cut = 0
        self.pieces = Ragged(self._split(texts, tokenizer))
        lengths = self.pieces.lengths
        if len(lengths) == 0:
            raise UserError(f"{name}: no passage has a token to predict")
        self.rows = pack(lengths.tolist(), config.length) if config.packing else [[i] for i in range(len(lengths))]
        tokens = np.array([lengths[row].sum() for row in self.rows], np.int64)
        self.sizes: Int[np.ndarray, "examples 2"] = np.stack([tokens, np.zeros_like(tokens)], axis=1)
        self.fill = float(tokens.sum() / (len(self.rows) * config.length))

    def _split(self, texts: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[list[int]]:
        masked = self.objective == "masked"
        before, after = tokenizer.frame(masked)
        length = self.config.length
        room = length - len(before) - len(after)
        pieces: list[list[int]] = []
        for ids in tokenizer.encode_batch([row["text"] for row in texts]):
            if not ids:
                continue
            if not self.config.packing:
                self.cut += len(ids) > room
                # A cut passage gets no end token: a causal model must not learn that it ends here.
                whole = before + ids[:room] + after if masked or len(ids) <= room else (before + ids)[:length]
                pieces.append(whole)
            elif masked:
                pieces.extend(before + ids[start : start + room] + after for start in range(0, len(ids), room))
            else:
                whole = before + ids + after
                pieces.extend(whole[start : start + length] for start in range(0, len(whole), length))
        # In a causal piece of one token there is nothing to predict.
        return pieces if masked else [piece for piece in pieces if len(piece) > 1]

    def shapes(self, others: Sequence[TextRows]) -> list[Shape]:
        """One shape: `length` tokens, of which all are scored, or as many as a full row has masked tokens."""
        for other in others:
            if (other.config.length, other.objective) != (self.config.length, self.objective):
                raise ValueError(
                    f"rows that share batches: expected length {self.config.length}, objective {self.objective}; "
                    f"got {other.config.length}, {other.objective}"
                )
        masked = self.objective == "masked"
        return [Shape(self.config.length, math.ceil(self.config.mask_rate * self.config.length) if masked else None)]

    def row(self, index: int, shape: Shape, noise: Noise) -> RowFields:
        """One row, see `EncodedRows.row`; the same `noise` masks the same tokens."""
        row = blank(shape, self.pad_id)
        if index < 0:
            return row
        used = place(row, [self.pieces[piece] for piece in self.rows[index]])
        if self.objective == "masked":
            self._mask(row, used, np.random.default_rng(noise))
        else:
            tokens, segments = row["tokens"], row["segments"]
            follows = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
            row["targets"][:-1] = np.where(follows, tokens[1:], 0)
            row["weights"][:-1] = follows
        return row

    def _mask(self, row: RowFields, used: int, random: np.random.Generator) -> None:
        tokens = row["tokens"]
        candidates = np.flatnonzero(self._is_ordinary[tokens[:used]])
        if not len(candidates):
            return
        count = max(1, round(self.config.mask_rate * len(candidates)))
        chosen = np.sort(random.permutation(candidates)[:count])
        row["predict"][:count] = chosen
        row["targets"][:count] = tokens[chosen]
        row["weights"][:count] = 1
        draw = random.random(count)
        other = self._ordinary[random.integers(len(self._ordinary), size=count)]
        shown = np.where(draw < self.config.mask_replace, cast(int, self.mask_id), tokens[chosen])
        replaced = (draw >= self.config.mask_replace) & (draw < self.config.mask_replace + self.config.mask_random)
        tokens[chosen] = np.where(replaced, other, shown)

    def describe(self) -> dict[str, Any]:
        """Passages, rows, tokens, cut passages and fill rate."""
        return {
            "passages": self._passages,
            "examples": len(self),
            "tokens": int(self.sizes[:, 0].sum()),
            "cut_passages": int(self.cut),
            "fill": round(self.fill, 4),
        }
