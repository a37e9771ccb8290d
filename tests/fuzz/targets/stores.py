"""What jaxcl writes for itself: teacher stores, encoded rows, memories."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcl.data.examples import read_shards
from jaxcl.data.memory import Memory
from jaxcl.data.teacher_store import TeacherStore, write_records
from jaxcl.sharding.mesh import MeshConfig, make_mesh
from jaxcl.training.values_file import read_values, write_values
from tests.fuzz.harness import Target
from tests.fuzz.targets.common import made, text_of, written

_MAGIC = b"jaxcl-teacher\x00"
_BETWEEN = b"\n--\n"  # records of an input


def open_store(path: Path) -> None:
    store = TeacherStore.open(path)
    for position in range(min(len(store), 100)):
        store[position]


def read_store(content: bytes, folder: Path) -> None:
    open_store(written(folder / "task00_process000.array_record", content))


def stored(path: Path, records: list[bytes], description: bytes) -> Path:
    """A file whose checksums are right, whatever it holds."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in (*records, _MAGIC + description):
        writer.write(record)
    writer.close()
    return path


def read_description(content: bytes, folder: Path) -> None:
    open_store(stored(folder / "store", contents_of_store()[0], content))


def read_stored(content: bytes, folder: Path) -> None:
    records = content.split(_BETWEEN)[:20]
    described = {**json.loads(contents_of_store()[1]), "count": len(records), "keys": list(range(len(records)))}
    open_store(stored(folder / "store", records, text_of(described)))


def store() -> bytes:
    import ml_dtypes

    rows = [
        (number, {"maps": np.ones((2, number + 1), np.float32), "codes": np.zeros(3, ml_dtypes.bfloat16)})
        for number in range(3)
    ]
    return made(lambda path: write_records(path, rows, {"task": 0, "model": "x"}))


@functools.cache
def contents_of_store() -> tuple[list[bytes], bytes]:
    """The records of `store`, and the description without its magic."""
    from array_record.python.array_record_module import ArrayRecordReader

    with tempfile.TemporaryDirectory() as folder:
        reader = ArrayRecordReader(str(written(Path(folder) / "store", store())))
        *records, last = reader.read_all()
        reader.close()
    return records, last.removeprefix(_MAGIC)


def read_halfway(content: bytes, folder: Path) -> None:
    """Values of a loop, with a checksum that is right."""
    path = written(folder / "after-0.0_process000.values", content + hashlib.sha256(content).digest())
    for value in read_values(path, {"checkpoint": 1}, one_device()) or ():
        str(value)


@functools.cache
def one_device() -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def halfway() -> bytes:
    values = [np.ones((2, 3), np.float32), jnp.ones(2), jnp.asarray(3), ["a", {"b": 1.5}], np.int32(4)]
    return made(lambda path: write_values(path, {"checkpoint": 1}, values))[:-32]


def read_examples(content: bytes, folder: Path) -> None:
    for shard in read_shards(written(folder / "task00.arrow", content)):
        shard.tokens.values.sum()


def examples() -> bytes:
    from jaxcl.data.examples import Shard, write_shards
    from jaxcl.data.ragged import Ragged

    tokens = Ragged.of([np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32)], np.int32)
    spans = Ragged.of([np.array([1, 2], np.int32), np.array([2], np.int32)], np.int32)
    return made(lambda path: write_shards(path, [Shard(tokens, spans, {"cut": 1})], np.int32))


def read_memory(content: bytes, folder: Path) -> None:
    for task in Memory.load(written(folder / "memory.json", content)).tasks:
        len(task.kept)


def memory() -> bytes:
    kept = Memory(seed=3).with_task(0, "first", count=30, examples=[7, 29, 12], sizes=((1, 2, 3),), rows="x")
    return made(kept.cut({0: 2}, after=1).save)


TARGETS: dict[str, Target] = {
    "teacher_store": Target(read_store, lambda: [store()], weight=2),
    "halfway": Target(read_halfway, lambda: [halfway()], weight=2),
    "teacher_description": Target(read_description, lambda: [contents_of_store()[1]]),
    "teacher_records": Target(read_stored, lambda: [_BETWEEN.join(contents_of_store()[0])]),
    "examples": Target(read_examples, lambda: [examples()]),
    "memory": Target(read_memory, lambda: [memory()]),
}
