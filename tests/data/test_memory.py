import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl.data.memory import Memory, MemoryPipeline, SubsetRows, draw_examples
from jaxcl.data.pairs import PairRows
from jaxcl.data.spec import DataConfig
from jaxcl.data.teacher_store import TeacherStore, write_records
from jaxcl.data.text import TextRows
from jaxcl.errors import UserError
from tests.tiny.batches import assert_same_batch
from tests.tiny.texts import TEXTS, small_tokenizer

CONFIG = DataConfig(length=32, buckets=2)
PAIRS = [{"prompt": f"number {i} " * (1 + i % 4), "answer": "plan " * (1 + i % 3)} for i in range(30)]


def rows(task, count=30):
    return PairRows(PAIRS[:count], small_tokenizer(), CONFIG, task=task, name=f"task{task}")


def memory():
    both = Memory(seed=5).with_task(0, "task0", count=30, fraction=0.2, minimum=1)
    return both.with_task(1, "task1", count=20, fraction=0.1, minimum=3)


@given(st.integers(0, 200), st.floats(0, 1), st.integers(0, 10), st.integers(0, 3), st.integers(0, 3))
def test_so_many_different_examples_are_drawn(count, fraction, minimum, seed, task):
    kept = draw_examples(count, fraction, minimum, seed=seed, task=task)
    assert len(kept) == min(count, max(minimum, round(fraction * count), 1 if fraction > 0 else 0))
    assert len(set(kept)) == len(kept)
    assert all(0 <= index < count for index in kept)
    assert kept == draw_examples(count, fraction, minimum, seed=seed, task=task)


def test_draws_are_spread_over_the_task_and_differ_by_seed_and_task():
    draws = [tuple(draw_examples(1000, 0.01, 1, seed=seed, task=task)) for seed in range(5) for task in range(5)]
    assert len(set(draws)) == 25
    # The mean of 250 draws from 0..999 has a standard deviation of 18.
    assert abs(np.mean(draws) - 499.5) < 4 * 18


def test_a_memory_is_kept_as_json(tmp_path):
    kept = memory()
    kept.save(tmp_path / "memory.json")
    assert Memory.load(tmp_path / "memory.json") == kept
    assert [len(one.examples) for one in kept.tasks] == [6, 3]
    again = kept.with_task(0, "task0", count=30, fraction=0.2, minimum=1)
    assert again == kept


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"seed": 1,\n "tasks": [}', "memory.json line 2"),
        ("[]", "not a memory file"),
        ('{"seed": 1, "extra": 2}', "not a memory file"),
        ('{"seed": 1, "version": 99}', "version 99"),
    ],
)
def test_unusable_memories_are_named(tmp_path, content, message):
    (tmp_path / "memory.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Memory.load(tmp_path / "memory.json")


def test_batches_hold_the_kept_examples_of_all_tasks_and_nothing_else():
    kept, sources = memory(), {0: rows(0), 1: rows(1, 20)}
    stream = MemoryPipeline(kept, sources, CONFIG, batch_size=4)
    for batches in (list(stream.once()), [stream.batch_at(s, seed=1) for s in range(stream.steps_per_epoch)]):
        seen = set()
        for batch in batches:
            assert batch["origin"] == "memory"
            for at, (task, example) in enumerate(zip(batch["task"], batch["example"], strict=True)):
                if example >= 0:
                    seen.add((int(task), int(example)))
                    shape = next(s for s in stream.shapes if s.length == batch["tokens"].shape[1])
                    expected = sources[int(task)].row(int(example), shape, ())
                    np.testing.assert_array_equal(batch["tokens"][at], expected["tokens"])
        assert seen == {(one.task, example) for one in kept.tasks for example in one.examples}
    only = MemoryPipeline(kept, sources, CONFIG, batch_size=4, tasks=[1])
    assert {int(task) for batch in only.once() for task in batch["task"]} == {1}


def test_rows_carry_what_was_stored_beside_them(tmp_path):
    kept, sources = memory(), {0: rows(0), 1: rows(1, 20)}
    stores = {}
    for one in kept.tasks:
        write_records(
            tmp_path / str(one.task),
            (
                (i, {"row": np.array([one.task, i], np.int32), "map": np.full(i % 3, i, np.float16)})
                for i in one.examples
            ),
        )
        stores[one.task] = TeacherStore.open(tmp_path / str(one.task))

    def collate(records, shape):
        rows, maps = np.zeros((len(records), 2), np.int32), np.zeros((len(records), 3), np.float16)
        for at, record in enumerate(records):
            if record is not None:
                rows[at], maps[at, : len(record["map"])] = record["row"], record["map"]
        return {"row": rows, "map": maps, "length": np.array(shape.length)}

    stream = MemoryPipeline(kept, sources, CONFIG, batch_size=8, stores=stores, collate=collate)
    filler = 0
    for batch in stream.once():
        teacher = batch["teacher"]
        assert teacher["length"] == batch["tokens"].shape[1]
        for at, (task, example) in enumerate(zip(batch["task"], batch["example"], strict=True)):
            if example >= 0:
                assert teacher["row"][at].tolist() == [task, example]
                assert teacher["map"][at].tolist() == [example] * (example % 3) + [0] * (3 - example % 3)
            else:
                filler += 1
                assert not teacher["row"][at].any()
    assert filler
    # A process whose rows are all fillers gets arrays of the same shapes.
    for step in range(stream.steps_per_epoch):
        shares = [stream.batch_at(step, seed=0, process_index=p, process_count=8) for p in range(8)]
        whole = stream.batch_at(step, seed=0)
        for name in ("row", "map"):
            np.testing.assert_array_equal(whole["teacher"][name], np.concatenate([s["teacher"][name] for s in shares]))


def test_a_store_without_an_example_is_an_error(tmp_path):
    kept, sources = memory(), {0: rows(0), 1: rows(1, 20)}
    write_records(tmp_path / "store", [(999, {"x": np.zeros(1)})])
    store = TeacherStore.open(tmp_path / "store")
    stream = MemoryPipeline(kept, sources, CONFIG, batch_size=8, stores={0: store, 1: store}, collate=lambda *_: {})
    with pytest.raises(UserError, match="no record of example"):
        next(stream.once())


def test_masked_memories_look_the_same_each_time():
    """What was stored beside them belongs to these masked tokens."""
    text = [{"text": t} for t in TEXTS * 4]
    source = TextRows(text, small_tokenizer(), CONFIG, objective="masked", task=0, name="news")
    kept = Memory(seed=5).with_task(0, "news", count=len(source), fraction=0.5, minimum=1)
    stream = MemoryPipeline(kept, {0: source}, CONFIG, batch_size=1)
    recorded = {int(batch["example"][0]): batch for batch in stream.once()}
    iterator = stream.train(seed=9)
    for _ in range(3 * stream.steps_per_epoch):
        batch = next(iterator)
        assert_same_batch(batch, recorded[int(batch["example"][0])])


def test_changed_data_is_noticed():
    with pytest.raises(UserError, match="memory of task task1 was drawn from 20 examples, the task now has 30"):
        MemoryPipeline(memory(), {0: rows(0), 1: rows(1)}, CONFIG, batch_size=4)
    with pytest.raises(UserError, match="memory: no examples"):
        MemoryPipeline(Memory(seed=0), {}, CONFIG, batch_size=4)
    with pytest.raises(ValueError, match="0 to 29, got 30"):
        SubsetRows(rows(0), [3, 30])


def test_a_memory_compiles_no_shape_of_its_own():
    source = rows(0)
    stream = MemoryPipeline(memory(), {0: source, 1: rows(1, 20)}, CONFIG, batch_size=4)
    assert stream.shapes == source.shapes([])


def test_json_is_readable(tmp_path):
    memory().save(tmp_path / "memory.json")
    content = json.loads((tmp_path / "memory.json").read_text())
    assert content["tasks"][1]["name"] == "task1"
    assert sorted(content) == ["seed", "tasks", "version"]
