"""How fast rows of tokens are read at random from ArrayRecord and from a memory-mapped Arrow file, and their sizes.

    python -m benchmarks.storage

Prints a JSON object per library and row length: microseconds per row read at random, and bytes per token. Grain stores
nothing itself: its data sources are these.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jaxcl.data.examples import ExampleTable, Shard, read_shards, write_shards
from jaxcl.data.ragged import Ragged

TOKENS = 8 * 2**20


def rows(length: int) -> np.ndarray:
    """Rows of tokens as Zipf's law spreads them."""
    draw = np.random.default_rng(0).zipf(1.2, TOKENS) % 32_000
    return draw.astype(np.uint16).reshape(-1, length)


def arrow(path: Path, tokens: np.ndarray) -> Callable[[int], np.ndarray]:
    """Writes an Arrow file and returns how a row is read."""
    one = np.full(len(tokens), tokens.shape[1])
    shard = Shard(Ragged.cut(tokens.reshape(-1), one), Ragged.cut(one, np.ones_like(one)), {})
    write_shards(path, [shard], tokens.dtype)
    table = ExampleTable(read_shards(path))
    return lambda index: table[index][0]


def array_record(path: Path, tokens: np.ndarray) -> Callable[[int], np.ndarray]:
    """Writes an ArrayRecord file and returns how a row is read."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in tokens:
        writer.write(row.tobytes())
    writer.close()
    reader = ArrayRecordReader(str(path))
    return lambda index: np.frombuffer(reader.read([index])[0], np.uint16)


def measured() -> Iterator[dict[str, object]]:
    """The measurements."""
    for length in (128, 2048):
        tokens = rows(length)
        order = np.random.default_rng(1).permutation(len(tokens))[:20_000].tolist()
        for write in (arrow, array_record):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "rows"
                read = write(path, tokens)
                started = time.perf_counter()
                total = sum(int(read(index)[0]) for index in order)
                seconds = time.perf_counter() - started
                assert total == int(tokens[order, 0].astype(np.int64).sum())
                yield {
                    "library": write.__name__,
                    "row": tokens.shape[1],
                    "microseconds_per_row": round(1e6 * seconds / len(order), 2),
                    "bytes_per_token": round(path.stat().st_size / tokens.size, 3),
                }


if __name__ == "__main__":
    for found in measured():
        print(json.dumps(found))
