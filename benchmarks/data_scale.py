"""What data of any size costs: building the cache, memory, bytes, the first batch of a later start, and feeding.

    python -m benchmarks.data_scale --megabytes 100,1000

Passages are drawn from the embedded texts and written to a file; each measurement is a process of its own. Prints one
JSON object, `sizes`, with per size:

    cost_ratio          seconds to read, count, tokenise and write the corpus, over the seconds that `encode_batch`
                        of `tokenizers` takes for the same lines in memory; measured in turns, part by part
    peak_gb             largest memory of the process that builds the cache or feeds from it
    bytes_per_token     size of the cache
    first_batch_s       from a task's configuration to its first batch, with the cache, after the imports
    first_batch_two_s   the same on two processes: the later of the two
    feed_tokens_per_s   tokens in batches of 2,048-token rows in random order
    masked_tokens_per_s the same for masked rows of 164 tokens
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax

from jaxcl.data.cache import Cache, Share
from jaxcl.data.pipeline import Pipeline, iterate
from jaxcl.data.sources import load_source, load_task
from jaxcl.data.spec import DataConfig, TaskSpec
from jaxcl.data.split import StreamedRows
from jaxcl.data.text import Objective, TextRows
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError
from jaxcl.run.components import Processes
from jaxcl.sharding.processes import initialize, wait_for_all

SOURCES = ("python_topics", "docstrings:numpy", "docstrings:jax", "docstrings:asyncio")
VOCABULARY = 32_000
SECONDS = 10.0
LINES = 2000


def sentences() -> list[str]:
    """Sentences of the embedded texts."""
    found: list[str] = []
    for name in SOURCES:
        for row in load_source(f"stdlib:{name}").train:
            found += [part for part in re.split(r"(?<=[.!?])\s+", row["text"]) if 20 < len(part) < 400]
    return found


def write_corpus(path: Path, megabytes: float, pool: list[str], seed: int = 0) -> None:
    """A text file of passages of one to eight sentences of a pool."""
    draw = random.Random(seed)
    left = megabytes * 1e6
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            line = " ".join(draw.choices(pool, k=draw.randint(1, 8))).replace("\n", " ") + "\n"
            file.write(line)
            left -= len(line.encode())


class OnePart(Share):
    """Makes one part of what a cache builds and leaves the others for later."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count, self._calls = index, count, 0

    def together(self, action: Callable[[], object]) -> None:
        """Runs the first action, which makes this share's part, not the second, which completes the others."""
        self._calls += 1
        if self._calls == 1:
            action()


def opened(folder: Path, share: Share | None = None) -> StreamedRows:
    """The training rows of the corpus, counted in the cache."""
    spec = TaskSpec(name="corpus", source=f"text:{folder / 'corpus.txt'}", heldout=0.001)
    rows = load_task(spec, cache=Cache(folder / "cache", share)).train
    assert isinstance(rows, StreamedRows)
    return rows


def encoded(
    folder: Path, rows: StreamedRows, objective: Objective, length: int, share: Share | None = None
) -> TextRows:
    """The rows of a model, encoded in the cache."""
    tokenizer, cache = Tokenizer.load(folder / "tokenizer"), Cache(folder / "cache", share)
    config = DataConfig(length=length)
    return TextRows(rows, tokenizer, config, objective=objective, task=0, name="corpus", cache=cache)


def build_masked(folder: Path) -> dict[str, float]:
    """Builds the cache of masked rows."""
    return {"tokens": encoded(folder, opened(folder), "masked", 164).total}


def build(folder: Path, objective: Objective = "causal", length: int = 2048) -> dict[str, float]:
    """Seconds to build the cache and to tokenise alone, part by part in turns, and the cache's bytes per token."""
    backend = Tokenizer.load(folder / "tokenizer").backend
    started = time.perf_counter()
    rows = opened(folder)
    seconds, alone = time.perf_counter() - started, 0.0
    count = len(rows.parts)
    for part in range(count):
        texts = [row["text"] for _, row in rows.part(part)]
        for start in range(0, len(texts), LINES):
            started = time.perf_counter()
            backend.encode_batch(texts[start : start + LINES], add_special_tokens=False)
            alone += time.perf_counter() - started
        started = time.perf_counter()
        with contextlib.suppress(UserError):  # other parts are missing
            encoded(folder, rows, objective, length, OnePart(part, count))
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    found = encoded(folder, rows, objective, length)
    seconds += time.perf_counter() - started
    return {
        "seconds": seconds,
        "alone": alone,
        "bytes_per_token": found.table.bytes / found.total,
        "tokens": found.total,
    }


def first_batch(folder: Path) -> dict[str, float]:
    """Seconds to the first batch in each of several processes, once they are connected."""
    initialize()
    started = time.perf_counter()
    pipeline = Pipeline([encoded(folder, opened(folder, Processes()), "causal", 2048, Processes())], 16, DataConfig())
    next(iterate(pipeline, 0, jax.process_index(), jax.process_count()))
    seconds = time.perf_counter() - started
    wait_for_all("measured")
    return {"first_batch_s": seconds}


def feed(folder: Path, objective: Objective = "causal", length: int = 2048, batch: int = 16) -> dict[str, float]:
    """Seconds to the first batch, and tokens per second after it."""
    started = time.perf_counter()
    pipeline = Pipeline([encoded(folder, opened(folder), objective, length)], batch, DataConfig())
    batches = iterate(pipeline, seed=0)
    next(batches)
    first = time.perf_counter() - started
    tokens, begun = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begun) < SECONDS:
        tokens += int((next(batches)["segments"] > 0).sum())
    return {"first_batch_s": first, "tokens_per_s": tokens / seconds}


PARTS = {
    "build": build,
    "feed": feed,
    "first_batch": first_batch,
    "build_masked": build_masked,
    "feed_masked": lambda folder: feed(folder, "masked", 164, 64),
}


def measured(part: str, folder: Path, processes: int = 1) -> dict[str, float]:
    """One measurement in a process of its own, or in several at once: the largest of their numbers."""
    command = [sys.executable, "-m", "benchmarks.data_scale", "--part", part, "--folder", str(folder)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **together, "JAX_PROCESS_ID": str(index)})
        for index in range(processes)
    ]
    each = [json.loads(one.communicate()[0].splitlines()[-1]) for one in started]
    found = {name: max(one[name] for one in each) for name in each[0]}
    print(f"{part}: {found}", file=sys.stderr, flush=True)
    return found


def measure(megabytes: float, folder: Path, pool: list[str]) -> dict[str, float]:
    """All measurements for one size."""
    write_corpus(folder / "corpus.txt", megabytes, pool)
    found = {part: measured(part, folder, 2 if part == "first_batch" else 1) for part in PARTS}
    return {
        "megabytes": megabytes,
        "cost_ratio": round(found["build"]["seconds"] / found["build"]["alone"], 3),
        "peak_gb": round(max(one["peak_gb"] for one in found.values()), 3),
        "bytes_per_token": round(found["build"]["bytes_per_token"], 3),
        "first_batch_s": round(found["feed"]["first_batch_s"], 2),
        "first_batch_two_s": round(found["first_batch"]["first_batch_s"], 2),
        "feed_tokens_per_s": round(found["feed"]["tokens_per_s"]),
        "masked_tokens_per_s": round(found["feed_masked"]["tokens_per_s"]),
        "tokens": found["build"]["tokens"],
        "encode_batch_s": round(found["build"]["alone"], 1),
    }


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", default="100,1000", help="sizes of the corpora")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        found = PARTS[options.part](options.folder)
        found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps(found))
        return
    sizes = []
    with tempfile.TemporaryDirectory() as place:
        folder, pool = Path(place), sentences()
        Tokenizer.train(pool, VOCABULARY).save(folder / "tokenizer")
        for megabytes in options.megabytes.split(","):
            sizes.append(measure(float(megabytes), folder, pool))
    print(json.dumps({"sizes": sizes}, indent=1))


if __name__ == "__main__":
    main()
