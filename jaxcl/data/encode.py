"""Rows to encoded examples: in memory, or once into the cache."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxcl.data.cache import Cache
from jaxcl.data.examples import ExampleTable, Shard, read_shards, write_shards
from jaxcl.data.split import Rows, StreamedRows

T = TypeVar("T")
NumberedRows = Iterable[tuple[int, Mapping[str, str]]]
#: Rows to encode, or examples that are encoded already.
Texts = Rows | Sequence[Mapping[str, str]] | ExampleTable
# Characters that are tokenised at once: enough for all cores, little enough to hold the results.
_CHARACTERS = 2**20


class Encoder(Protocol):
    """Turns rows into examples.

    Attributes:
      key: everything but the rows that the examples follow from, as JSON.
      dtype: type of token ids.
    """

    key: Mapping[str, Any]
    dtype: np.dtype

    def shards(self, rows: NumberedRows) -> Iterator[Shard]:
        """The examples of rows that are given with their numbers."""
        ...


def encode_rows(rows: Texts, encoder: Encoder, cache: Cache | None = None) -> ExampleTable:
    """The examples of rows: those in memory are encoded in memory; those read from files, in the cache.

    Args:
      rows: the rows, or examples that are encoded already and returned as they are.
      encoder: what encodes them.
      cache: needed for streamed rows.
    """
    if isinstance(rows, ExampleTable):
        return rows
    if not isinstance(rows, StreamedRows):
        return ExampleTable(list(encoder.shards(enumerate(rows))))
    if cache is None:
        raise ValueError("cache: needed for rows that are read from files, got None")

    make = functools.partial(_write, rows, encoder)
    key = {"rows": rows.key, "encoder": encoder.key}
    paths = cache.build("tokens", key, len(rows.parts), make, ".arrow")
    return ExampleTable([shard for path in paths for shard in read_shards(path)])


def _write(rows: StreamedRows, encoder: Encoder, part: int, path: Path) -> None:
    write_shards(path, encoder.shards(rows.part(part)), encoder.dtype, pixels="images" in encoder.key)


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each computed in a thread while the one before is used."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming: Future[Any] = pool.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, source, end)
            yield item


def batched(rows: NumberedRows) -> Iterator[list[tuple[int, Mapping[str, str]]]]:
    """Rows in lists of about a million characters."""
    found: list[tuple[int, Mapping[str, str]]] = []
    characters = 0
    for number, row in rows:
        found.append((number, row))
        characters += sum(map(len, row.values()))
        if characters >= _CHARACTERS:
            yield found
            found, characters = [], 0
    if found:
        yield found


__all__ = ["Encoder", "NumberedRows", "Texts", "ahead", "batched", "encode_rows"]
