import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jaxcl.data.examples import ExampleTable, Shard, read_shards
from jaxcl.data.memory import Memory
from jaxcl.data.memory_files import file_names, hash_of, read_examples, read_texts, write_examples
from jaxcl.data.plan import count_sizes, spread_sizes
from jaxcl.data.ragged import Ragged
from jaxcl.errors import UserError

TABLE = ExampleTable(
    [
        Shard(Ragged.of([[1, 2, 3], [4, 5]], np.uint16), Ragged.of([[1, 2], [2]]), {"cut": 1}),
        Shard(Ragged.of([[6], [7, 8, 9, 10]], np.uint16), Ragged.of([[1], [1, 1, 2]]), {}),
    ]
)
TEXTS = [{"text": "one\u2028two\nthree"}, {"text": "ü"}]


def written(folder: Path) -> Memory:
    memory = Memory(seed=0).with_task(3, "news", count=9, examples=[8, 2])
    write_examples(folder, memory.tasks[0], TABLE.take([1, 3]), TEXTS)
    names = file_names(memory.tasks[0])
    return memory.with_files({3: {name: hash_of(folder / name, "news") for name in names}})


def test_examples_come_back_as_they_were_written(tmp_path: Path) -> None:
    (task,) = written(tmp_path).tasks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["task03.arrow", "task03.jsonl"]
    table = read_examples(tmp_path, task)
    assert [(tokens.tolist(), spans.tolist()) for tokens, spans in (table[0], table[1])] == [
        ([4, 5], [2]),
        ([7, 8, 9, 10], [1, 1, 2]),
    ]
    assert table.shards[0].tokens.values.dtype == np.uint16
    assert read_texts(tmp_path, task, [2, 8]) == TEXTS
    assert read_texts(tmp_path, task, [8]) == TEXTS[1:]
    lines = (tmp_path / "task03.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["example"] for line in lines[:-1]] == [2, 8]


def test_later_versions_have_files_of_their_own(tmp_path: Path) -> None:
    task = written(tmp_path).cut({3: 1}, after=5).tasks[0]
    assert file_names(task) == ("task03_after05.arrow", "task03_after05.jsonl")


@pytest.mark.parametrize("name", ["task03.arrow", "task03.jsonl"])
def test_edited_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    (task,) = written(tmp_path).tasks
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} has changed since the run wrote it: .* task news"):
        read_examples(tmp_path, task)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing: .* task news"):
        read_examples(tmp_path, task)


def test_examples_are_taken_in_any_order_and_cost_what_a_file_holds_of_them(tmp_path: Path) -> None:
    some = TABLE.take([2, 0])
    assert [some[0][0].tolist(), some[1][0].tolist(), some[1][1].tolist()] == [[6], [1, 2, 3], [1, 2]]
    assert some.count("cut") == 0
    assert TABLE.costs.tolist() == [3 * 2 + 2 * 4 + 12, 2 * 2 + 4 + 12, 2 + 4 + 12, 4 * 2 + 3 * 4 + 12]
    written(tmp_path)
    stored = read_examples(tmp_path, written(tmp_path).tasks[0])
    # But for where the last example ends.
    assert stored.bytes == TABLE.costs[[1, 3]].sum() + 12


def test_counted_sizes_say_all_that_shapes_follow_from() -> None:
    sizes = np.array([[7, 2], [5, 3], [7, 4], [9, 1], [5, 3]])
    assert count_sizes(sizes) == [(5, 2, 3), (7, 2, 4), (9, 1, 1)]
    again = spread_sizes(count_sizes(sizes))
    assert sorted(again[:, 0]) == sorted(sizes[:, 0])
    for length in range(5, 10):
        assert again[again[:, 0] <= length, 1].max() == sizes[sizes[:, 0] <= length, 1].max()
    assert spread_sizes([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("columns", "counts"),
    [
        ([[[1]], [[1]]], None),
        ([[[1]], [[1]]], "{"),
        ([[[1]], [[1]]], '{"cut": "1"}'),
        ([[[1]], [[1]]], "[" * 100_000),
        ([[1], [1]], "{}"),
        ([[[1]]], "{}"),
        ([[["a"]], [["b"]]], "{}"),
    ],
)
def test_an_arrow_file_of_something_else_is_one_line(
    tmp_path: Path, columns: list[list[Any]], counts: str | None
) -> None:
    batch = pa.record_batch([pa.array(column) for column in columns], names=["tokens", "spans"][: len(columns)])
    path = tmp_path / "task00.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch, custom_metadata=None if counts is None else {"counts": counts})
    with pytest.raises(UserError, match=r"task00.arrow is damaged: .+; remove it"):
        read_shards(path)
