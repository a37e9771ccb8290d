"""How fast remembered pairs are fed with what SEEKR stores of them.

    python -m benchmarks.feed_pairs

Writes pairs and a teacher store of the shapes that `seekr` has for a decoder of SmolLM2-135M's size (34 heads, 100
queries, compact rows), and feeds batches of 16 of them in random order, decompressed and padded. Prints a JSON object:
tokens per second, padding left out, and the size of a record on disk and in a batch. Feeding is also timed without the
records.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.data_scale import SECONDS, VOCABULARY, sentences
from jaxcl.data.memory import Memory, MemoryPipeline
from jaxcl.data.pairs import PairRows
from jaxcl.data.pipeline import Pipeline, iterate
from jaxcl.data.spec import DataConfig
from jaxcl.data.split import ListRows
from jaxcl.data.teacher_store import Record, TeacherStore, write_records
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.methods.seekr import Seekr, SeekrOptions
from jaxcl.models.llama_config import LlamaConfig
from jaxcl.models.network import Network
from jaxcl.training.stored import Collate, stored_shapes, trim

KEPT, BATCH = 512, 16
HEADS, QUERIES = 34, 100


def pairs(pool: list[str]) -> ListRows:
    """Prompts of some sentences, each with one sentence as its answer."""
    draw = random.Random(0)
    return ListRows(
        {"prompt": " ".join(draw.choices(pool, k=draw.randint(2, 12))), "answer": draw.choice(pool)}
        for _ in range(KEPT)
    )


def records(
    method: Seekr, params: object, state: object, rows: PairRows, pipeline: Pipeline
) -> Iterator[tuple[int, Record]]:
    """A record per pair; its attention rows are softmaxes of random scores that fall off with distance."""
    draw = np.random.default_rng(0)
    shapes = {shape: stored_shapes(method, params, state, 1, shape) for shape in pipeline.shapes}
    for example in range(len(rows)):
        tokens, spans = rows.examples[example]
        length, answer = len(tokens), int(spans[-1])
        shape = next(shape for shape in pipeline.shapes if shape.length >= length)
        signals = {name: np.zeros(one.shape[1:], one.dtype) for name, one in shapes[shape].items()}
        queries = np.sort(draw.choice(length, min(QUERIES, length), replace=False))
        signals["queries"][:] = -1
        signals["queries"][: len(queries)] = queries
        distance = queries[:, None] - np.arange(length)
        scores = draw.normal(size=(HEADS, len(queries), length)) - 0.02 * np.abs(distance)
        scores = np.where(distance >= 0, scores, -np.inf)
        # In 8 bits as `encode_rows` does it: roots of the weights, in 255ths of the largest.
        roots = np.exp((scores - scores.max(-1, keepdims=True)) / 2)
        signals["rows"][:, : len(queries), :length] = np.round(255 * roots)
        yield example, trim(signals, method.stored, length=length, predict=answer)


def speed(pipeline: Pipeline) -> float:
    """Tokens per second."""
    batches = iterate(pipeline, seed=0)
    next(batches)
    tokens, begun = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begun) < SECONDS:
        tokens += int((next(batches)["segments"] > 0).sum())
    return tokens / seconds


def main() -> None:
    """See the module's text."""
    pool = sentences()
    tokenizer = Tokenizer.train(pool, VOCABULARY)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3}
    network = Network.create(LlamaConfig(vocab_size=VOCABULARY, **sizes))
    options = SeekrOptions.model_validate({"layer_budget": 22, "head_budget": HEADS, "query_budget": QUERIES})
    method = Seekr(options, network, 2)
    params = network.shapes()
    state = jax.eval_shape(method.init, params)
    config = DataConfig(prompt_length=384, answer_length=64, on_long_answer="cut", threads=2)
    rows = PairRows(pairs(pool), tokenizer, config, task=0, name="pairs")
    memory = Memory(seed=0).with_task(0, "pairs", count=len(rows), examples=range(len(rows)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher.array_record"
        plain = MemoryPipeline(memory, {0: rows}, config, batch_size=BATCH)
        write_records(path, records(method, params, state, rows, plain))
        stores = {0: TeacherStore.open(path)}
        with_records = MemoryPipeline(
            memory, {0: rows}, config, batch_size=BATCH, stores=stores, collate=Collate(method, params, state)
        )
        batch = next(iterate(with_records, seed=0))
        found = {
            "tokens_per_s": round(speed(with_records)),
            "without_records": round(speed(plain)),
            "record_kb_on_disk": round(path.stat().st_size / len(rows) / 1e3, 1),
            "record_kb_in_batch": round(sum(one.nbytes for one in (batch["teacher"] or {}).values()) / BATCH / 1e3, 1),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
