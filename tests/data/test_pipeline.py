import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcl.data.pairs import PairRows
from jaxcl.data.pipeline import LabelledPipeline, PairPipeline, Pipeline, TextPipeline
from jaxcl.data.plan import Shape
from jaxcl.data.spec import DataConfig
from jaxcl.data.text import TextRows
from jaxcl.errors import UserError
from tests.tiny.batches import assert_same_batch, same_batch
from tests.tiny.texts import TEXTS, small_tokenizer

PAIRS = [{"prompt": "moving " * (1 + 7 * i % 23), "answer": "plan " * (1 + i % 3)} for i in range(37)]
CONFIG = DataConfig(length=32, buckets=3, length_multiple=8)
FIELDS = {
    "tokens", "segments", "positions", "predict", "targets", "weights", "task", "example", "labels", "types", "teacher",
    "origin",
}  # fmt: skip


def pipeline(kind="pairs", batch_size=4, config=CONFIG):
    passages = [{"text": text} for text in TEXTS * 8]
    if kind == "pairs":
        return PairPipeline(PAIRS, small_tokenizer(), config, batch_size=batch_size, task=2)
    if kind == "labelled":
        labelled = [{**row, "label": "ab"[i % 2]} for i, row in enumerate(passages[:19])]
        return LabelledPipeline(labelled, ["a", "b"], small_tokenizer(), config, masked=True, batch_size=batch_size)
    return TextPipeline(passages, small_tokenizer(), config, objective=kind, batch_size=batch_size)


KINDS = ["pairs", "causal", "masked", "labelled"]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_have_the_fields_and_types_of_a_batch(kind):
    stream = pipeline(kind)
    for batch in stream.once():
        assert batch.keys() == FIELDS
        assert batch["origin"] == "task"
        assert (batch["predict"] is None) == (kind == "causal")
        assert (batch["labels"] is None) == (kind != "labelled")
        shape = Shape(batch["tokens"].shape[1], None if kind == "causal" else batch["predict"].shape[1])
        assert shape in stream.shapes
        for name, value in batch.items():
            if isinstance(value, np.ndarray):
                assert value.dtype == (np.float32 if name == "weights" else np.int32), name
                assert len(value) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_shows_every_example_once_and_differs(kind):
    stream = pipeline(kind)
    iterator = stream.train(seed=1)
    orders = []
    for _ in range(3):
        seen = np.concatenate([batch["example"] for batch in take(iterator, stream.steps_per_epoch)])
        assert sorted(seen[seen >= 0]) == list(range(stream.examples))
        orders.append(seen.tolist())
    assert len({str(order) for order in orders}) == 3
    iterator.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_stream(kind):
    first, again, other = (take(pipeline(kind).train(seed), 30) for seed in (1, 1, 2))
    for left, right in zip(first, again, strict=True):
        assert_same_batch(left, right)
    assert not all(same_batch(left, right) for left, right in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_position_gives_the_identical_continuation(kind):
    iterator = pipeline(kind).train(seed=1)
    take(iterator, 7)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = take(iterator, 30)
    fresh = pipeline(kind).train(seed=1)
    fresh.set_state(state)
    for left, right in zip(rest, take(fresh, 30), strict=True):
        assert_same_batch(left, right)
    # Also where batches have been read ahead already.
    iterator.set_state(state)
    for left, right in zip(rest, take(iterator, 30), strict=True):
        assert_same_batch(left, right)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batch_of_one_process_among_them(kind, count):
    whole = pipeline(kind).train(seed=1)
    parts = [pipeline(kind).train(1, index, count) for index in range(count)]
    for _ in range(25):
        expected = next(whole)
        shares = [next(part) for part in parts]
        for name, value in expected.items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(value, np.concatenate([share[name] for share in shares]))
    for left, right in zip(pipeline().once(), pipeline().once(process_index=0, process_count=1), strict=True):
        assert_same_batch(left, right)


@given(count=st.integers(1, 24), batch_size=st.integers(1, 6), limit=st.none() | st.integers(1, 30))
@settings(deadline=None)
def test_one_pass_shows_what_it_should_once(count, batch_size, limit):
    stream = PairPipeline(PAIRS[:count], small_tokenizer(), CONFIG, batch_size=batch_size)
    for seed in (None, 3):
        batches = list(stream.once(limit, seed))
        seen = np.concatenate([batch["example"] for batch in batches])
        real = sorted(seen[seen >= 0])
        assert len(set(real)) == len(real) == min(limit or count, count)
        if seed is None:
            assert real == list(range(len(real)))
        for batch in batches:
            filler = batch["example"] < 0
            assert not batch["weights"][filler].any()
            assert not batch["segments"][filler].any()


def test_a_limited_pass_is_drawn_by_seed():
    def drawn(seed):
        return sorted(i for batch in pipeline().once(8, seed) for i in batch["example"])

    assert drawn(0) == drawn(0)
    assert len({str(drawn(seed)) for seed in range(4)}) > 1


def test_masking_differs_between_epochs_and_not_between_passes():
    stream = pipeline("masked", batch_size=1)
    first = {int(b["example"][0]): b["tokens"].tolist() for b in stream.once(seed=4)}
    assert first == {int(b["example"][0]): b["tokens"].tolist() for b in stream.once(seed=4)}
    iterator = stream.train(seed=4)
    epochs = [
        {int(b["example"][0]): b["tokens"].tolist() for b in take(iterator, stream.steps_per_epoch)} for _ in "12"
    ]
    assert epochs[0] != epochs[1]


def test_tasks_of_different_kinds_share_a_stream_but_no_batch():
    tokenizer = small_tokenizer()
    pairs = PairRows(PAIRS, tokenizer, CONFIG, task=0, name="pairs")
    text = TextRows([{"text": t} for t in TEXTS], tokenizer, CONFIG, objective="causal", task=1, name="text")
    stream = Pipeline([pairs, text], 4, CONFIG)
    seen = set()
    for batch in take(stream.train(0), stream.steps_per_epoch):
        assert len(set(batch["task"])) == 1
        assert (batch["predict"] is None) == (batch["task"][0] == 1)
        seen |= {(int(task), int(i)) for task, i in zip(batch["task"], batch["example"], strict=True) if i >= 0}
    assert seen == {(0, i) for i in range(len(pairs))} | {(1, i) for i in range(len(text))}


def test_joint_training_mixes_tasks_of_one_kind():
    tokenizer = small_tokenizer()
    sources = [PairRows(PAIRS, tokenizer, CONFIG, task=task, name=f"task{task}") for task in range(3)]
    stream = Pipeline(sources, 8, CONFIG)
    batches = take(stream.train(0), stream.steps_per_epoch)
    assert any(len(set(batch["task"])) > 1 for batch in batches)
    seen = sorted((int(t), int(i)) for b in batches for t, i in zip(b["task"], b["example"], strict=True) if i >= 0)
    assert seen == [(task, i) for task in range(3) for i in range(len(PAIRS))]
    assert stream.describe()["sources"].keys() == {"task0", "task1", "task2"}


def test_given_shapes_are_used_and_too_small_ones_refused():
    stream = PairPipeline(PAIRS, small_tokenizer(), CONFIG, batch_size=4, shapes=[Shape(200, 20)])
    assert stream.shapes == [Shape(200, 20)]
    with pytest.raises(ValueError, match="expected room for every example"):
        PairPipeline(PAIRS, small_tokenizer(), CONFIG, batch_size=4, shapes=[Shape(200, 1)])


def test_unusable_sizes_are_refused():
    with pytest.raises(UserError, match="batch of 4 rows cannot be split over 3 processes"):
        next(pipeline().train(0, 0, 3))
    with pytest.raises(UserError, match="no examples"):
        PairPipeline([], small_tokenizer(), CONFIG, batch_size=4, name="empty")


def test_counts_are_reported():
    described = pipeline().describe()
    assert described["examples"] == 37
    assert described["steps_per_epoch"] == 10
    assert 0 < described["real_token_share"] <= 1
    json.dumps(described)


def test_the_data_layer_imports_neither_jax_nor_a_hub():
    code = (
        "import pkgutil, importlib, sys, jaxcl.data\n"
        "for module in pkgutil.iter_modules(jaxcl.data.__path__):\n"
        "    if module.name != 'builders':  # TFDS classes, imported when a tfds: name is looked up\n"
        "        importlib.import_module('jaxcl.data.' + module.name)\n"
        "print([n for n in ('jax', 'tensorflow', 'tensorflow_datasets', 'datasets', 'torch') if n in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
