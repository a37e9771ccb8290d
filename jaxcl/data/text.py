"""Running text as token rows, packed or one passage per row, for causal and masked language models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Int

from jaxcl.data.cache import Cache
from jaxcl.data.encode import NumberedRows, Texts, ahead, batched, encode_rows
from jaxcl.data.examples import SHARD_TOKENS, Shard, token_type
from jaxcl.data.packing import pack
from jaxcl.data.plan import Shape
from jaxcl.data.ragged import Ragged
from jaxcl.data.rows import EncodedRows, Noise, RowFields, blank, place
from jaxcl.data.spec import DataConfig
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError

Objective = Literal["causal", "masked"]


class TextEncoder:
    """Passages to rows of at most `length` tokens, each a sequence of segments; see `TextRows`.

    Rows are packed shard by shard, so that neither memory nor time grows faster than the text.
    """

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, objective: Objective) -> None:
        self._tokenizer = tokenizer
        self._objective = objective
        self._length = config.length
        self._packing = config.packing
        self.dtype = token_type(tokenizer.vocab_size)
        self.key: Mapping[str, Any] = {
            "kind": "text",
            "tokenizer": tokenizer.fingerprint,
            "objective": objective,
            "length": config.length,
            "packing": config.packing,
        }

    def shards(self, rows: NumberedRows) -> Iterator[Shard]:
        """The rows of passages; see `Encoder.shards`."""
        pieces: list[Ragged] = []
        counts = {"passages": 0, "cut": 0}
        texts = ([row["text"] for _, row in batch] for batch in ahead(batched(rows)))
        for ids in ahead(map(self._tokenizer.encode_batch, texts)):
            counts["passages"] += len(ids)
            pieces.append(self._pieces(ids, counts))
            if sum(len(one.values) for one in pieces) >= SHARD_TOKENS:
                yield self._packed(Ragged.joined(pieces), counts)
                pieces, counts = [], {"passages": 0, "cut": 0}
        if pieces:
            yield self._packed(Ragged.joined(pieces), counts)

    def _pieces(self, passages: Sequence[Sequence[int]], counts: dict[str, int]) -> Ragged:
        masked = self._objective == "masked"
        before, after = self._tokenizer.frame(masked)
        room = self._length - len(before) - len(after)
        ids = Ragged.of(passages, self.dtype)
        ids = ids.take(np.flatnonzero(ids.lengths))
        if not self._packing:
            counts["cut"] += int((ids.lengths > room).sum())
        if masked:
            return (ids.split(room) if self._packing else ids.heads(room)).framed(before, after)
        whole = ids.framed(before, after)
        # A cut passage gets no end token: a causal model must not learn that it ends here.
        pieces = whole.split(self._length) if self._packing else whole.heads(self._length)
        # In a causal piece of one token there is nothing to predict.
        return pieces.take(np.flatnonzero(pieces.lengths > 1))

    def _packed(self, pieces: Ragged, counts: Mapping[str, int]) -> Shard:
        lengths = pieces.lengths
        if not self._packing:
            return Shard(pieces, Ragged.cut(lengths, np.ones_like(lengths)), counts)
        rows = pack(lengths.tolist(), self._length)
        order = np.fromiter((piece for row in rows for piece in row), np.int64, len(lengths))
        spans = Ragged.cut(lengths[order], np.fromiter(map(len, rows), np.int64, len(rows)))
        sums = np.concatenate([[0], np.cumsum(spans.values)])
        tokens = Ragged(pieces.take(order).values, sums[spans.offsets])
        return Shard(tokens, spans, counts)


class TextRows(EncodedRows):
    """Passages as rows of `length` tokens.

    Causal: every token except the last of its segment predicts the next one; `predict` is absent. Masked: exactly
    `round(mask_rate * tokens)` of a row's tokens are predicted (at least one; special tokens are neither counted nor
    chosen). By default 80% of them are replaced by the mask token, 10% by a random token, and 10% are unchanged.

    With packing, a row holds several passages as segments that do not attend to each other, and a passage longer than a
    row continues in another. Without, a row holds one passage; one that is too long is cut and counted.

    Attributes:
      table: token ids of each row, and lengths of its segments.
      cut: number of passages cut on the right.
      fill: share of the rows' tokens that are not padding.
    """

    group = "text"

    def __init__(
        self,
        texts: Texts,
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        objective: Objective,
        task: int,
        name: str,
        cache: Cache | None = None,
    ) -> None:
        """Encodes and packs all passages.

        Args:
          texts: rows with `text`, or examples that are encoded already.
          tokenizer: the model's tokenizer; a masked objective needs its mask token.
          config: `length`, `packing` and the masking rates are used.
          objective: `causal` for a decoder, `masked` for an encoder.
          task: index of the task.
          name: name of task and split, for messages.
          cache: where streamed rows are encoded; see `encode_rows`.

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
        self.table = encode_rows(texts, TextEncoder(tokenizer, config, objective), cache)
        if not len(self.table):
            raise UserError(f"{name}: no passage has a token to predict")
        self.cut = self.table.count("cut")
        self.fill = self.table.total / (len(self.table) * config.length)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def sizes(self) -> Int[np.ndarray, "examples 2"]:
        """Tokens per row, and 0: every position of a row is scored, whatever its tokens."""
        lengths = self.table.lengths
        return np.stack([lengths, np.zeros_like(lengths)], axis=1)

    @property
    def total(self) -> int:
        """Tokens of all rows."""
        return self.table.total

    def smallest(self, shapes: Sequence[Shape]) -> Int[np.ndarray, " examples"]:
        """All rows have the one shape."""
        return np.zeros(len(self), np.uint8)

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
        tokens, segments = self.table[index]
        used = place(row, tokens, segments)
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
            "passages": self.table.count("passages"),
            "examples": len(self),
            "tokens": self.total,
            "cut_passages": self.cut,
            "fill": round(self.fill, 4),
        }
