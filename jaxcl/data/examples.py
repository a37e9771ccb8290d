"""Encoded examples: token sequences with the spans they consist of, in memory or in memory-mapped Arrow files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from jaxcl.data.ragged import Ragged
from jaxcl.errors import UserError

#: Tokens after which a shard ends. What is planned from the lengths of examples (packing) is planned per shard.
SHARD_TOKENS = 4 * 2**20
# What `write_shards` writes: a length per span, and per example an offset of either kind.
_SPAN_BYTES, _PLACE_BYTES = 4, 8 + 4


class Shard(NamedTuple):
    """Examples that are stored together.

    Attributes:
      tokens: token ids of each example.
      spans: lengths of the spans that each example consists of; they sum to its tokens.
      counts: what the encoder has counted, such as cut passages.
      pixels: bytes of the tiles of each example's images, uint8; `None` where the model does not see.
    """

    tokens: Ragged
    spans: Ragged
    counts: Mapping[str, int]
    pixels: Ragged | None = None


class ExampleTable:
    """Examples of several shards, by number.

    Attributes:
      shards: the shards.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        self._starts = np.concatenate([[0], np.cumsum([len(shard.tokens) for shard in self.shards], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " spans"]]:
        """Token ids and span lengths of an example."""
        shard, local = self._at(index)
        return shard.tokens[local], shard.spans[local]

    def _at(self, index: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.shards[number], index - int(self._starts[number])

    def pixels(self, index: int) -> UInt8[np.ndarray, " bytes"]:
        """Bytes of the tiles of an example's images."""
        shard, local = self._at(index)
        return np.zeros(0, np.uint8) if shard.pixels is None else shard.pixels[local]

    @property
    def pixel_bytes(self) -> Int[np.ndarray, " examples"]:
        """Bytes of the tiles of each example's images."""
        found = [
            np.zeros(len(one.tokens), np.int64) if one.pixels is None else one.pixels.lengths for one in self.shards
        ]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def last_learned(self, index: int) -> Int[np.ndarray, " tokens"]:
        """The last span of an example that is learned, where every second one is."""
        tokens, spans = self[index]
        last = len(spans) // 2 * 2
        stop = int(spans[:last].sum())
        return tokens[stop - int(spans[last - 1]) : stop]

    @property
    def total(self) -> int:
        """Number of tokens of all examples."""
        return sum(int(shard.tokens.offsets[-1] - shard.tokens.offsets[0]) for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes that the examples take, on disk or in memory."""
        each = [column for shard in self.shards for column in (shard.tokens, shard.spans, shard.pixels)]
        columns = [column for column in each if column is not None]
        return sum(column.values.nbytes + column.offsets.nbytes for column in columns)

    @property
    def lengths(self) -> Int[np.ndarray, " examples"]:
        """Tokens of each example, int32."""
        found = [shard.tokens.lengths.astype(np.int32) for shard in self.shards]
        return np.concatenate(found) if found else np.zeros(0, np.int32)

    def every_second_span(self) -> Int[np.ndarray, " examples"]:
        """Sum of the spans 1, 3, ... of each example, counted from 0, int32."""
        found = [np.zeros(0, np.int32)]
        for shard in self.shards:
            lengths = shard.spans.lengths
            place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            kept = np.where(place % 2, shard.spans.flat, 0)
            sums = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])
            bounds = np.concatenate([[0], np.cumsum(lengths)])
            found.append((sums[bounds[1:]] - sums[bounds[:-1]]).astype(np.int32))
        return np.concatenate(found)

    @property
    def costs(self) -> Int[np.ndarray, " examples"]:
        """Bytes that each example takes in a file: its tokens and spans, where they begin, and its images."""
        found = [np.zeros(0, np.int64)]
        for shard in self.shards:
            tokens, spans = shard.tokens.lengths.astype(np.int64), shard.spans.lengths.astype(np.int64)
            found.append(tokens * shard.tokens.values.itemsize + spans * _SPAN_BYTES + _PLACE_BYTES)
        return np.concatenate(found) + self.pixel_bytes

    def take(self, numbers: Sequence[int]) -> ExampleTable:
        """A copy of some examples, in the given order; what the encoder has counted is left out."""
        found = [self[number] for number in numbers]
        dtype = self.shards[0].tokens.values.dtype if self.shards else np.dtype(np.int32)
        tokens = Ragged.of([tokens.tolist() for tokens, _ in found], dtype)
        pixels = None
        if any(shard.pixels is not None for shard in self.shards):
            pixels = Ragged.of_arrays([self.pixels(number) for number in numbers], np.uint8)
        return ExampleTable([Shard(tokens, Ragged.of([spans.tolist() for _, spans in found]), {}, pixels)])

    def count(self, name: str) -> int:
        """The sum of a count over the shards."""
        return sum(shard.counts.get(name, 0) for shard in self.shards)


def token_type(vocab_size: int) -> np.dtype:
    """The narrowest type for the ids of a vocabulary: uint16 or uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_shards(path: Path, shards: Iterable[Shard], dtype: np.dtype, *, pixels: bool = False) -> None:
    """Writes an Arrow file with one record batch per shard; shards are consumed one at a time.

    Args:
      path: the file.
      shards: the shards.
      dtype: type of the token ids.
      pixels: whether the shards have any.

    Raises:
      OSError: the file cannot be written.
    """
    import pyarrow as pa

    columns = [("tokens", pa.large_list(pa.from_numpy_dtype(dtype))), ("spans", pa.list_(pa.uint32()))]
    schema = pa.schema([*columns, ("pixels", pa.large_list(pa.uint8()))] if pixels else columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for shard in shards:
            ids, lengths = shard.tokens.values.astype(dtype, copy=False), shard.spans.values.astype(np.uint32)
            tokens = pa.LargeListArray.from_arrays(shard.tokens.offsets, pa.array(ids))
            spans = pa.ListArray.from_arrays(shard.spans.offsets.astype(np.int32), pa.array(lengths))
            arrays = [tokens, spans]
            if pixels and shard.pixels is not None:
                arrays.append(pa.LargeListArray.from_arrays(shard.pixels.offsets, pa.array(shard.pixels.values)))
            batch = pa.record_batch(arrays, schema=schema)
            writer.write_batch(batch, custom_metadata={"counts": json.dumps(dict(shard.counts))})


def read_shards(path: Path) -> list[Shard]:
    """The shards of a file, memory-mapped: what is not read stays on disk.

    Raises:
      UserError: the file is missing or damaged.
    """
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        return [_shard(*reader.get_batch_with_custom_metadata(index)) for index in range(reader.num_record_batches)]
    except (OSError, pa.ArrowException, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)  # columns of other types have no offsets
        raise UserError(f"{path} is damaged: {reason}; remove it, it is written again") from error


def _shard(batch: Any, metadata: Any) -> Shard:
    batch.validate()  # a list that ends beyond its buffer would be read from memory that is not its own
    counts = json.loads(metadata[b"counts"])
    if not (isinstance(counts, dict) and all(type(count) is int for count in counts.values())):
        raise ValueError("its counts are not numbers by name")
    pixels = _ragged(batch.column(2)) if batch.num_columns > 2 else None
    return Shard(_ragged(batch.column(0)), _ragged(batch.column(1)), counts, pixels)


def _ragged(column: Any) -> Ragged:
    return Ragged(column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy(zero_copy_only=True))
