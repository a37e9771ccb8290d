"""Inputs that once crashed a reader, or took too much, as small as they can be; by target."""

from __future__ import annotations

import functools
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.fuzz.targets.common import made, text_of
from tests.fuzz.targets.data import zstd
from tests.fuzz.targets.runs import RESULTS, compared
from tests.fuzz.targets.stores import contents_of_store, halfway
from tests.fuzz.targets.weights import HF, gguf_file

DEEP = b"[" * 100_000
HUGE = 10**400
EMPTY: dict[str, Any] = {"metric": ["x"] * 20_000, "matrix": [[]] * 20_000}
STATE: dict[str, Any] = {"format": 1, "number": 1, "identity": "x", "files": {}}
NAN, INFINITY = float("nan"), float("inf")


def results(**changes: Any) -> bytes:
    return text_of({**RESULTS, **changes})


def state(name: str, *file: Any) -> bytes:
    return text_of({**STATE, "files": {name: file or [1, "0" * 64, 0.0]}})


def zipped(name: str, content: bytes, method: int = zipfile.ZIP_STORED) -> bytearray:
    """An archive of one file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(zipfile.ZipInfo(name), content, method)
    return bytearray(file.getvalue())


def changed(content: bytearray, local: int, central: int, value: int) -> bytes:
    """An archive of one file with a byte in both of its headers."""
    content[local] = content[content.find(b"PK\x01\x02") + central] = value
    return bytes(content)


def words(value: Any) -> bytes:
    """A member of a message."""
    return made(lambda path: np.save(path, np.frombuffer(json.dumps(value).encode(), np.uint8)), "words.npy")


@functools.cache
def repeated(character: bytes, compress: Callable[[bytes], bytes] = gzip.compress) -> bytes:
    """Compressed text of 1.25 GiB: archives of one character behind each other."""
    return compress(character * 2**26) * 20


def damaged() -> bytes:
    content = zipped("words.npy", words({"task": 1}), zipfile.ZIP_DEFLATED)
    content[30 + len("words.npy")] = 7  # a kind of block that does not exist
    return bytes(content)


def parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.array([b"\xff\xfe"], pa.binary()).cast(pa.string(), safe=False)
    return made(lambda path: pq.write_table(pa.table({"text": text}), path))


def repeating() -> bytes:
    """A text of a megabyte that 1,500 rows repeat, in less than 500 bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.array(["x" * 2**20]).take(pa.array([0] * 1500))
    return made(lambda path: pq.write_table(pa.table({"text": text}), path, compression="zstd"))


def overflowing() -> bytes:
    """A record whose shape has more elements than a machine word counts."""
    return (2**62).to_bytes(8, "little") * 2 + contents_of_store()[0][0][16:]


def vast(name: bytes) -> bytes:
    """A GGUF header with three billion layers, or coordinates."""
    content = bytearray(gguf_file())
    start = content.index(name) + len(name) + 4  # behind the kind of value
    content[start : start + 4] = (3 * 10**9).to_bytes(4, "little")
    return bytes(content)


KNOWN: dict[str, Callable[[], list[bytes]]] = {
    "gguf": lambda: [vast(b"llama.block_count"), vast(b"llama.embedding_length")],
    "gzip": lambda: [repeated(b"x"), gzip.compress(b'[{"text": "') + repeated(b"x")],
    "xz": lambda: [repeated(b"x", lzma.compress)],
    "zstd": lambda: [repeated(b"x", zstd)],
    "csv": lambda: [",".join(map(str, range(60_000))).encode()],
    "tsv": lambda: ["\t".join(map(str, range(60_000))).encode()],
    "labels": lambda: [repeated(b" ")],
    "safetensors_index": lambda: [b'{"weight_map": {"b": "\\ud800"}}', b'{"weight_map": {"b": ""}}'],
    "hf_config": lambda: [text_of({**HF, name: HUGE}) for name in ("head_dim", "hidden_size", "vocab_size")],
    "tokenizer": lambda: [
        repeated(b" "), text_of({"post_processor": {"type": "TemplateProcessing", "single": 1, "pair": 1}}),
    ],
    "tokenizer_config": lambda: [repeated(b" ")],
    "memory": lambda: [repeated(b" ")],
    "parquet": lambda: [parquet(), repeating()],
    "preprocessor_config": lambda: [
        b"[]", repeated(b" "),
        text_of({"size": {"longest_edge": 10**9}, "max_image_size": {"longest_edge": 8}}),
    ],
    "teacher_records": lambda: [overflowing()],
    "teacher_description": lambda: [contents_of_store()[1].replace(b'"float32"', b'",loat32"')],
    "halfway": lambda: [halfway().replace(b'"float32"', b'",loat32"', 1), halfway().replace(b"[2, 3]", b"[2, 9e99]")],
    "tracking": lambda: [DEEP, b'{"wandb": "\\ud800", "mlflow": "ffff"}'],
    "comparison": lambda: [
        DEEP, b'{"methods": {}, "tasks": [], "runs": 5}', b'{"methods": {}, "tasks": 5}',
        compared()[0].replace(b'"std"', b'"sdt"', 1), compared()[1].replace(b'"chosen"', b'"chosan"'),
    ],
    "show_results": lambda: [
        results(tasks=["\ud800", "\x1b[2J"]), results(parameters="x"), results(initial=5), results(initial=[HUGE]),
        results(matrix=[[HUGE]]), results(further={"x": 5}), results(timing={"a": HUGE}),
        results(skipped={"a": "x"}), results(**EMPTY),
    ],
    "show_metrics": lambda: [b'{"step": 1, "task": 5, "task_step": 1}'],
    "show_note": lambda: [text_of({"progress": {"task": INFINITY, "phase": "learned"}, "mark": None})],
    "results": lambda: [results(**EMPTY)],
    "report_results": lambda: [results(seconds=NAN), results(seconds=INFINITY)],
    "message": lambda: [
        changed(zipped("words.npy", words({})), 6, 8, 1),
        changed(zipped("words.npy", words({})), 8, 10, 99), damaged(), bytes(zipped("words", b"{}")),
    ],
    "state": lambda: [
        state("a", INFINITY, "0" * 64, 0.0), state("a", 1, "../../../../../../../../tmp/x", 0.0),
        state("a", 1, "0" * 64, 1e300), state("a", 1, "0" * 64, NAN),
        state("\ud800"), state("9" * 5000),
        text_of({**STATE, "files": {"a": [1, "0" * 64, 0], "a/b": [1, "1" * 64, 0]}}),
        text_of({**STATE, "number": INFINITY}),
    ],
    }  # fmt: skip
