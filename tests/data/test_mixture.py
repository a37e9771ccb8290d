"""Mixtures of sources: shares in every window, epochs of each source, processes, and resuming."""

import itertools
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from jaxcl.data.fingerprint import rows_print
from jaxcl.data.mixture import WINDOW, MixedRows, MixturePipeline
from jaxcl.data.packed_pairs import pack_pairs
from jaxcl.data.pairs import PairRows
from jaxcl.data.pipeline import Pipeline
from jaxcl.data.repeats import row_hash, row_hashes
from jaxcl.data.sources import load_task
from jaxcl.data.spec import DataConfig, MixedSource, TaskSpec
from jaxcl.data.split import JoinedRows, ListRows
from jaxcl.data.text import TextRows
from jaxcl.errors import UserError
from tests.tiny.batches import assert_same_batch
from tests.tiny.texts import TEXTS, small_tokenizer

CONFIG = DataConfig(length=32, buckets=1, packing=False)
BUCKETS = DataConfig(buckets=3, length_multiple=4)


def passages(count, name, task=0, words=3):
    texts = [{"text": " ".join([name, str(number), *TEXTS[number % 5].split()[:words]])} for number in range(count)]
    return TextRows(texts, small_tokenizer(), CONFIG, objective="causal", task=task, name=name)


def pairs(count, name, task=0, config=BUCKETS, length=5):
    texts = [
        {"prompt": f"{name} {'moving ' * (number % length)}{number}", "answer": "plan " * (1 + number % 2)}
        for number in range(count)
    ]
    return PairRows(texts, small_tokenizer(), config, task=task, name=name)


def text_mixture(sizes=(40, 10, 7), weights=(0.7, 0.2, 0.1), by="rows"):
    sources = [passages(size, f"source{number}") for number, size in enumerate(sizes)]
    return MixedRows(sources, weights, by, name="mixed")


def pair_mixture(sizes=(60, 9), weights=(0.75, 0.25), by="rows", config=BUCKETS):
    sources = [pairs(size, f"source{number}", config=config) for number, size in enumerate(sizes)]
    return MixedRows(sources, weights, by, name="mixed")


def stream(kind="text", batch_size=4, **options):
    if kind == "text":
        return MixturePipeline([text_mixture(**options)], batch_size, CONFIG)
    return MixturePipeline([pair_mixture(**options)], batch_size, BUCKETS)


def sources_of(mixed, batch):
    """The source of each row of a batch."""
    assert (batch["example"] >= 0).all(), "no filler rows"
    return np.searchsorted(mixed.sources[0].starts, batch["example"], side="right") - 1


def counts(mixed, steps, **where):
    found = Counter()
    for step in steps:
        found.update(sources_of(mixed, mixed.batch_at(step, seed=3, **where)).tolist())
    return [found[source] for source in range(len(mixed.sources[0].sources))]


@pytest.mark.parametrize(("first", "length"), [(0, 1), (0, 5), (3, 10), (17, 25), (10**9, 5)])
def test_rows_of_one_length_are_in_their_shares_in_any_range_of_batches(first, length):
    mixed = stream()
    found = counts(mixed, range(first, first + length))
    assert sum(found) == 4 * length
    for count, share in zip(found, (0.7, 0.2, 0.1), strict=True):
        assert abs(count - share * 4 * length) < 3


def test_pairs_of_several_lengths_are_in_their_shares_in_every_window():
    mixed = stream("pairs")
    assert len(mixed.shapes) > 1
    for window in (0, 1, 7):
        assert counts(mixed, range(window * WINDOW, (window + 1) * WINDOW)) == [WINDOW * 3, WINDOW]
    shapes = {mixed.batch_at(step, seed=3)["tokens"].shape[1] for step in range(WINDOW)}
    assert shapes == {shape.length for shape in mixed.shapes}


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_each_source_is_passed_through_in_shuffled_epochs_of_its_own(kind):
    mixed = stream(kind)
    window = 1 if kind == "text" else WINDOW
    steps = 20 * WINDOW
    starts = mixed.sources[0].starts
    for source, (start, stop) in enumerate(itertools.pairwise(starts.tolist())):
        seen = []
        for first in range(0, steps, window):
            batches = [mixed.batch_at(step, seed=3) for step in range(first, first + window)]
            examples = np.concatenate([batch["example"] for batch in batches])
            seen.append(examples[(examples >= start) & (examples < stop)])
        taken = sum(map(len, seen))
        times = np.bincount(np.concatenate(seen) - start, minlength=stop - start)
        assert times.max() - times.min() <= 1, source
        assert times.min() == taken // (stop - start)
    orders = [mixed._order(3, 0, 0, epoch, 40).tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("kind", ["text", "pairs"])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(kind, processes):
    mixed = stream(kind)
    for step in (0, 1, 31, 32, 33, 500):
        whole = mixed.batch_at(step, seed=5)
        shares = [
            stream(kind).batch_at(step, seed=5, process_index=index, process_count=processes)
            for index in range(processes)
        ]
        for field, value in whole.items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(value, np.concatenate([share[field] for share in shares]), field)


@pytest.mark.parametrize("kind", ["text", "pairs"])
def test_a_stream_goes_on_where_it_stopped(kind):
    whole = stream(kind).train(seed=2)
    batches = [next(whole) for _ in range(40)]
    begun = stream(kind).train(seed=2)
    for _ in range(33):
        next(begun)
    state = json.loads(json.dumps(begun.get_state()))
    resumed = stream(kind).train(seed=2)
    resumed.set_state(state)
    for expected in batches[33:]:
        assert_same_batch(next(resumed), expected)
    assert any(
        (one["example"] != other["example"]).any()
        for one, other in zip(batches, stream(kind).train(seed=4), strict=False)
    )
    for iterator in (whole, begun, resumed):
        iterator.close()


def test_by_tokens_the_weights_are_shares_of_tokens():
    long, short = passages(30, "long", words=12), passages(30, "short", words=1)
    mixed = MixturePipeline([MixedRows([long, short], (0.5, 0.5), "tokens", name="mixed")], 8, CONFIG)
    tokens = Counter()
    # Whole epochs of each source, so that its mean length is exact.
    for step in range(400):
        batch = mixed.batch_at(step, seed=0)
        for source, row in zip(sources_of(mixed, batch), batch["segments"], strict=True):
            tokens[source] += int((row > 0).sum())
    assert tokens[0] / sum(tokens.values()) == pytest.approx(0.5, abs=0.003)
    rows = counts(mixed, range(20))
    assert rows[0] < 0.4 * sum(rows)


def test_an_epoch_sees_the_heaviest_source_once():
    assert text_mixture().epoch == Fraction(400, 7)
    assert stream().steps_per_epoch == 15  # 57.1 rows
    # Of equally heavy ones, that with the most rows.
    assert MixturePipeline([text_mixture((5, 20), (1, 1))], 4, CONFIG).steps_per_epoch == 10
    mixed = MixturePipeline([text_mixture((40, 10), (0.8, 0.2))], 10, CONFIG)
    seen = np.concatenate([mixed.batch_at(step, seed=0)["example"] for step in range(mixed.steps_per_epoch)])
    assert sorted(seen.tolist()) == list(range(50))


def test_joint_training_keeps_each_mixture_and_the_proportions_of_tasks():
    plain = passages(50, "plain", task=1)
    mixed = MixturePipeline([text_mixture((40, 10), (0.8, 0.2)), plain], 10, CONFIG)
    assert mixed.steps_per_epoch == 10
    for first in (0, 10, 90):
        batches = [mixed.batch_at(step, seed=0) for step in range(first, first + 10)]
        found = Counter(
            zip(*(np.concatenate([b[name] for b in batches]).tolist() for name in ("task", "example")), strict=True)
        )
        assert len(found) == 100
        assert set(found.values()) == {1}


def test_text_and_pairs_take_turns_by_steps():
    both = MixturePipeline([text_mixture((40, 10), (0.8, 0.2)), pairs(30, "pairs", task=1)], 10, CONFIG)
    assert both.steps_per_epoch == 8
    for first in (0, 8, 80):
        tasks = [set(both.batch_at(step, seed=0)["task"].tolist()) for step in range(first, first + 8)]
        assert sorted(map(tuple, tasks)) == [(0,)] * 5 + [(1,)] * 3


def test_a_pass_over_some_examples_has_the_shares_and_one_over_all_has_each_once():
    mixed = stream(sizes=(40, 40, 40))
    some = np.concatenate([batch["example"] for batch in mixed.once(20, seed=1)])
    assert Counter((some[some >= 0] // 40).tolist()) == {0: 14, 1: 4, 2: 2}
    whole = np.concatenate([batch["example"] for batch in mixed.once(seed=1)])
    assert sorted(whole[whole >= 0].tolist()) == list(range(120))


def test_rows_of_a_mixture_are_those_of_its_sources():
    mixed = pair_mixture()
    shape = mixed.shapes([])[-1]
    assert mixed.total == sum(rows.total for rows in mixed.sources)
    assert mixed.units == len(mixed) == 69
    for index, (source, local) in {0: (0, 0), 59: (0, 59), 60: (1, 0), 68: (1, 8)}.items():
        np.testing.assert_array_equal(
            mixed.row(index, shape, (0,))["tokens"], mixed.sources[source].row(local, shape, (0,))["tokens"]
        )
        np.testing.assert_array_equal(mixed.examples[index][0], mixed.sources[source].table[local][0])
    assert not mixed.row(-1, shape, (0,))["weights"].any()
    described = Pipeline([mixed], 4, BUCKETS).describe()["sources"]["mixed"]
    assert described["examples"] == 69
    assert described["mix"]["source1"]["row_share"] == 0.25


def test_masked_tokens_differ_whenever_a_row_comes_again():
    texts = [{"text": TEXTS[0]}]
    rows = TextRows(texts, small_tokenizer(), CONFIG, objective="masked", task=0, name="x")
    mixed = MixturePipeline([MixedRows([rows, rows], (1, 1), "rows", name="x")], 2, CONFIG)
    seen = {mixed.batch_at(step, seed=0)["tokens"].tobytes() for step in range(5)}
    assert len(seen) == 5
    assert_same_batch(mixed.batch_at(3, seed=0), mixed.batch_at(3, seed=0))


def test_packed_pairs_are_mixed_by_their_examples():
    sources = [pairs(300, "a", length=1), pairs(90, "b", length=9)]
    packed = pack_pairs({0: MixedRows(sources, (0.5, 0.5), "rows", name="mixed")}, 32)[0]
    assert len(packed) < packed.units == 390
    mixed = MixturePipeline([packed], 8, BUCKETS)
    found = Counter()
    for step in range(300):
        batch = mixed.batch_at(step, seed=0)
        for source, row in zip(sources_of(mixed, batch), batch["segments"], strict=True):
            found[source] += int(row.max())
    assert found[0] / sum(found.values()) == pytest.approx(0.5, abs=0.01)


# ---------------------------------------------------------------- opening


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def task(*mix, **options):
    return TaskSpec(name="both", mix=[MixedSource(**one) for one in mix], **options)


def test_the_rows_of_a_task_are_those_of_its_sources(tmp_path):
    one = write(tmp_path, "a.jsonl", [{"q": f"a{n}", "answer": str(n)} for n in range(40)])
    two = write(tmp_path, "b.jsonl", [{"prompt": f"b{n}", "reply": str(n)} for n in range(20)])
    spec = task(
        {"source": one, "weight": 1, "prompt_field": "q", "train": 10},
        {"source": two, "weight": 3, "name": "second", "answer_field": "reply", "prompt_template": "say {prompt}"},
    )
    data = load_task(spec)
    assert [part.name for part in data.mixed] == [f"both: {one}", "both: second"]
    assert len(data.train) == 10 + len(data.mixed[1].train)
    assert [*data.train] == [*data.mixed[0].train, *data.mixed[1].train]
    assert [*data.test] == [*data.mixed[0].test, *data.mixed[1].test]
    assert data.train.pick([0, 9, 10, 11]) == [
        *data.mixed[0].train.pick([0, 9]),
        *data.mixed[1].train.pick([0, 1]),
    ]
    assert data.train.pick([10])[0]["prompt"].startswith("say b")
    again = load_task(spec)
    assert data.train.fingerprint == again.train.fingerprint
    assert data.train.fingerprint["content"] == rows_print([*data.train])["content"]
    swapped = load_task(spec.model_copy(update={"mix": spec.mix[::-1]}))
    hashes = row_hashes(data.train)
    assert hashes.tolist() == [row_hash(row) for row in data.train]
    assert data.train.fingerprint["ordered"] != swapped.train.fingerprint["ordered"]
    assert data.train.fingerprint["content"] == swapped.train.fingerprint["content"]


def test_mistakes_name_task_and_source(tmp_path):
    pairs = write(tmp_path, "a.jsonl", [{"prompt": f"a{n}", "answer": str(n)} for n in range(40)])
    text = write(tmp_path, "b.jsonl", [{"text": f"b{n}"} for n in range(20)])
    for second, message in {
        text: r"task both: jsonl:.*b.jsonl: its rows are text, those of both: jsonl:.*a.jsonl are pairs",
        "jsnl:x": r"^task both: jsnl:x: source 'jsnl:x': expected `scheme:rest`",
        f"jsonl:{tmp_path}/no.jsonl": r"^task both: jsonl:.*no.jsonl: .*does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            load_task(task({"source": pairs, "weight": 1}, {"source": second, "weight": 1}))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mix": [{"source": "text:a", "weight": 0}]}, "mix: task both: the weight of text:a must be above 0, got 0"),
        ({"mix": [{"source": "text:a", "weight": -1}]}, "the weight of text:a must be above 0, got -1"),
        ({"mix": [{"source": "text:a", "weight": 1}] * 2}, "two sources are called text:a"),
        ({"mix": [{"source": "text:a", "weight": 1}], "source": "text:b"}, "either a source or a mix"),
        ({}, "task both needs either a source or a mix"),
        ({"mix": [{"source": "text:a", "weight": 1}], "train": 5}, "train: task both is a mix"),
        ({"mix": [{"source": "text:a", "weight": 1}], "prompt_template": "{a}"}, "prompt_template: task both is a mix"),
    ],
)
def test_sections_that_cannot_be_used(section, message):
    with pytest.raises(ValueError, match=message):
        TaskSpec(name="both", **section)


def test_rows_that_move_between_sources_change_the_fingerprint():
    one, two, three = ({"text": text} for text in ("one", "two", "three"))
    cuts = [([one, two], [three]), ([one], [two, three])]
    whole = [JoinedRows([ListRows(rows) for rows in cut]) for cut in cuts]
    assert list(whole[0]) == list(whole[1])
    assert whole[0].fingerprint["ordered"] != whole[1].fingerprint["ordered"]
    assert whole[0].fingerprint["content"] == whole[1].fingerprint["content"]
