import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl.data.memory import Memory, MemoryPipeline, RememberedRows, draw_examples
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
    both = Memory(seed=5).with_task(0, "task0", count=30, examples=[7, 3, 29, 11, 12, 20])
    return both.with_task(1, "task1", count=20, examples=[19, 0, 4])


def kept_rows(kept):
    """Rows of the kept examples alone, encoded from the whole tasks."""
    return {
        one.task: PairRows(
            rows(one.task, one.count).table.take(one.kept), small_tokenizer(), CONFIG, task=one.task, name=one.name
        )
        for one in kept.tasks
    }


@given(st.integers(0, 200), st.floats(0, 1), st.integers(0, 10), st.integers(0, 3), st.integers(0, 3))
def test_as_many_different_examples_are_drawn_as_asked_for(count, fraction, minimum, seed, task):
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
    kept = memory().cut({0: 2, 1: 3}, after=1).with_files({0: {"a": "hash"}})
    kept.save(tmp_path / "memory.json")
    assert Memory.load(tmp_path / "memory.json") == kept
    assert [one.kept for one in kept.tasks] == [(3, 7), (0, 4, 19)]
    assert [one.ranked for one in kept.tasks] == [(7, 3), (19, 0, 4)]
    assert [len(one.versions) for one in kept.tasks] == [2, 1]
    assert [one.versions[-1].files for one in kept.tasks] == [{"a": "hash"}, {}]


def test_a_memory_is_as_it_was_when_fewer_tasks_were_learned():
    kept = memory().cut({0: 2}, after=1).with_task(2, "task2", count=9, examples=[1]).cut({0: 0, 1: 1}, after=2)
    assert [one.kept for one in kept.tasks] == [(), (19,), (1,)]
    assert kept.of({0, 1}) == memory().cut({0: 2}, after=1)
    assert kept.of({0}) == Memory(seed=5, tasks=memory().tasks[:1])
    assert kept.of(set()) == Memory(seed=5)
    assert kept.with_task(1, "task1", count=4, examples=[3]).tasks[1].kept == (3,)


@pytest.mark.parametrize(
    ("examples", "sizes", "message"),
    [
        ([3, 3], [2], "different numbers from 0 to 8"),
        ([3, 9], [2], "different numbers from 0 to 8"),
        ([3], [2], "a version is larger than the one before it"),
        ([3, 4], [1, 2], "a version is larger"),
    ],
)
def test_impossible_memories_are_refused(tmp_path, examples, sizes, message):
    versions = [{"after": 0, "size": size} for size in sizes]
    task = {"task": 0, "name": "x", "count": 9, "examples": examples, "versions": versions}
    (tmp_path / "memory.json").write_text(json.dumps({"version": 2, "seed": 0, "tasks": [task]}))
    with pytest.raises(UserError, match=message):
        Memory.load(tmp_path / "memory.json")


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
    stream = MemoryPipeline(kept, kept_rows(kept), CONFIG, batch_size=4)
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
        assert seen == {(one.task, example) for one in kept.tasks for example in one.kept}
    only = MemoryPipeline(kept, kept_rows(kept), CONFIG, batch_size=4, tasks=[1])
    assert {int(task) for batch in only.once() for task in batch["task"]} == {1}


def test_rows_carry_what_was_stored_beside_them(tmp_path):
    kept, sources = memory(), kept_rows(memory())
    stores = {}
    for one in kept.tasks:
        write_records(
            tmp_path / str(one.task),
            ((i, {"row": np.array([one.task, i], np.int32), "map": np.full(i % 3, i, np.float16)}) for i in one.kept),
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
    kept, sources = memory(), kept_rows(memory())
    write_records(tmp_path / "store", [(999, {"x": np.zeros(1)})])
    store = TeacherStore.open(tmp_path / "store")
    stream = MemoryPipeline(kept, sources, CONFIG, batch_size=8, stores={0: store, 1: store}, collate=lambda *_: {})
    with pytest.raises(UserError, match="no record of example"):
        next(stream.once())


def test_masked_memories_look_the_same_each_time():
    """What was stored beside them belongs to these masked tokens."""
    text = [{"text": t} for t in TEXTS * 4]
    source = TextRows(text, small_tokenizer(), CONFIG, objective="masked", task=0, name="news")
    kept = Memory(seed=5).with_task(0, "news", count=len(source), examples=range(len(source)))
    stream = MemoryPipeline(kept, {0: source}, CONFIG, batch_size=1)
    recorded = {int(batch["example"][0]): batch for batch in stream.once()}
    iterator = stream.train(seed=9)
    for _ in range(3 * stream.steps_per_epoch):
        batch = next(iterator)
        assert_same_batch(batch, recorded[int(batch["example"][0])])


def test_rows_that_do_not_belong_to_the_memory_are_refused():
    with pytest.raises(ValueError, match="expected the 6 kept examples of task0, got 30"):
        MemoryPipeline(memory(), {0: rows(0), 1: rows(1)}, CONFIG, batch_size=4)
    with pytest.raises(UserError, match="memory: no examples"):
        MemoryPipeline(Memory(seed=0), {}, CONFIG, batch_size=4)
    described = RememberedRows(kept_rows(memory())[1], [0, 4, 19], 20).describe()
    assert described == {"examples": 3, "of": 20, "tokens": int(rows(1).sizes[[0, 4, 19], 0].sum())}


def test_json_is_readable(tmp_path):
    memory().save(tmp_path / "memory.json")
    content = json.loads((tmp_path / "memory.json").read_text())
    assert content["tasks"][1]["name"] == "task1"
    assert sorted(content) == ["seed", "tasks", "version"]
