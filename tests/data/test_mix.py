import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxcl.data.memory import Memory, MemoryPipeline
from jaxcl.data.mix import Interleaved, Mixed, WithGeneral, general_share
from jaxcl.data.pipeline import PairPipeline, Pipeline
from jaxcl.data.spec import DataConfig
from tests.tiny.batches import assert_same_batch
from tests.tiny.texts import small_tokenizer

CONFIG = DataConfig(buckets=1)


def pairs(count):
    return [{"prompt": f"number {i}", "answer": "plan"} for i in range(count)]


def streams(tasks=20, memories=6, batch=2):
    new = PairPipeline(pairs(tasks), small_tokenizer(), CONFIG, batch_size=batch, task=1)
    old = PairPipeline(pairs(memories), small_tokenizer(), CONFIG, batch_size=batch, task=0)
    memory = Memory(seed=0).with_task(0, "old", count=memories, examples=range(memories))
    remembered = MemoryPipeline(memory, {0: old.sources[0]}, CONFIG, batch_size=batch, shapes=new.shapes)
    return new, remembered


def mixture(tasks=20, memories=6, **options):
    return Interleaved(*streams(tasks, memories), **options)


def kinds(mixed, count):
    iterator = mixed.train(0)
    found = [next(iterator)["origin"][0] for _ in range(count)]
    iterator.close()
    return "".join(found)


def test_the_order_is_as_asked():
    assert kinds(mixture(every=3), 12) == "tttmtttmtttm"
    assert kinds(mixture(every=1), 6) == "tmtmtm"
    # 10 task batches and 3 memory batches: after batch ceil(10/3), ceil(20/3), 10.
    assert kinds(mixture(), 26) == "ttttmtttmtttm" * 2


def test_spaced_by_distance_memory_batches_come_where_the_model_moves():
    # Nothing moves in the first four steps; then the rate falls from 4 to 1, twice each: 20 in all.
    mixed = mixture(every=2).spaced([0, 0, 0, 0, 4, 4, 3, 3, 2, 2, 1, 1])
    # Four memory batches in 12 steps, after a sum of 5, 10, 15 and 20.
    assert kinds(mixed, 12) == "tttttmmtmttm"
    assert mixed.own_steps_in(12) == 8
    assert mixed.steps_for(8) == 12


@given(every=st.integers(1, 9), total=st.integers(2, 60), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_spacing_changes_no_number_of_batches(every, total, seed):
    plain = mixture(every=every)
    rates = np.random.default_rng(seed).exponential(size=total) * (np.arange(total) > seed % 7)
    assume(rates.sum() > 0)  # a model that does not move leaves the order as it is
    mixed = plain.spaced(rates.tolist())
    own = plain.own_steps_in(total)
    assert mixed.own_steps_in(total) == own
    batches = [mixed.batch_at(step, seed=0) for step in range(total)]
    assert sum(int(batch["origin"][0] == "m") for batch in batches) == total - own
    if total - own:
        assert mixed.steps_for(own) == total
        moved = np.cumsum(rates)
        places = np.flatnonzero(mixed.order[:total])
        wanted = moved[-1] * np.arange(1, total - own + 1) / (total - own)
        # A memory batch comes when the sum is reached, and not before, but for those that make room for others.
        gaps, latest = np.diff(places, prepend=-1), total - len(places) + np.arange(len(places))
        reached, before = moved[places] >= wanted * (1 - 1e-9), (moved - rates)[places] < wanted
        assert np.all(reached | (places == latest) | (moved[-1] <= 0))
        assert np.all(before | (gaps == 1) | (moved[-1] <= 0))


def test_a_model_that_does_not_move_is_spaced_by_steps():
    plain = mixture(every=3)
    assert plain.spaced([0.0] * 12) is plain


@given(tasks=st.integers(1, 30), memories=st.integers(1, 30), every=st.integers(0, 40), steps=st.integers(1, 20))
@settings(deadline=None, max_examples=80)
def test_replay_is_never_off(tasks, memories, every, steps):
    mixed = mixture(tasks, memories, every=every, latest=steps)
    taken = kinds(mixed, mixed.steps_for(steps))
    assert taken.count("t") == steps
    assert taken.count("m") >= 1
    if every:
        assert taken.count("m") == max(1, steps // every)


def test_a_memory_batch_that_would_come_too_late_comes_at_the_latest_that_is_asked():
    assert kinds(mixture(every=7, latest=3), 8) == "tttmtttm"
    assert kinds(mixture(every=2, latest=3), 6) == "ttmttm"
    # 10 task batches and 3 memory batches an epoch; the first would stand behind four task batches.
    assert kinds(mixture(latest=2), 6) == "ttmttm"


@given(tasks=st.integers(1, 30), memories=st.integers(1, 30), every=st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_an_epoch_sees_each_example_once_and_by_default_the_memory_once(tasks, memories, every):
    mixed = mixture(tasks, memories, every=every)
    epoch = [mixed.batch_at(step, seed=0) for step in range(mixed.steps_per_epoch)]
    by_kind = {kind: [b for b in epoch if b["origin"] == kind] for kind in ("task", "memory")}
    assert epoch[0]["origin"] == "task"
    assert len(by_kind["task"]) == mixed.task.steps_per_epoch
    seen = [i for b in by_kind["task"] for i in b["example"] if i >= 0]
    assert sorted(seen) == list(range(tasks))
    if every:
        assert len(by_kind["memory"]) == mixed.task.steps_per_epoch // every
    else:
        seen = [i for b in by_kind["memory"] for i in b["example"] if i >= 0]
        assert sorted(seen) == list(range(memories))


@pytest.mark.parametrize("options", [{}, {"every": 3}, {"every": 1}])
def test_steps_for_counts_what_comes_before_the_next_task_batch(options):
    mixed = mixture(**options)
    order = kinds(mixed, 60)
    for task_steps in range(25):
        length = mixed.steps_for(task_steps)
        assert order[:length].count("t") == task_steps
        assert order[length] == "t"
        assert mixed.own_steps_in(length) == task_steps


@pytest.mark.parametrize("options", [{}, {"every": 3}, {"every": 1}])
def test_both_streams_run_on_in_their_own_order(options):
    mixed = mixture(**options)
    found: dict[str, list] = {"task": [], "memory": []}
    for step in range(3 * mixed.steps_per_epoch):
        batch = mixed.batch_at(step, seed=4)
        found[batch["origin"]].append(batch)
    for kind, stream in (("task", mixed.task), ("memory", mixed.memory)):
        for number, batch in enumerate(found[kind]):
            assert_same_batch(batch, stream.batch_at(number, seed=4))


def mixed():
    return Mixed(*streams())


def test_mixed_batches_bring_the_memory_along():
    stream = mixed()
    assert stream.steps_per_epoch == stream.task.steps_per_epoch == 10
    assert stream.memory.steps_per_epoch == 3
    for step in range(25):
        batch = stream.batch_at(step, seed=4)
        assert_same_batch(batch.pop("memory"), stream.memory.batch_at(step, seed=4))
        assert_same_batch(batch, stream.task.batch_at(step, seed=4))
    first_pass = [i for step in range(3) for i in stream.batch_at(step, seed=4)["memory"]["example"] if i >= 0]
    assert sorted(first_pass) == list(range(6))


def flat(batch):
    """A batch, and the one beside it if there is one."""
    batch = dict(batch)
    beside = batch.pop("memory", None)
    return [batch] if beside is None else [batch, beside]


@pytest.mark.parametrize("make", [mixture, mixed])
def test_a_saved_position_gives_the_identical_continuation(make):
    iterator = make().train(seed=3)
    for _ in range(11):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    fresh = make().train(seed=3)
    fresh.set_state(state)
    for _ in range(40):
        assert_same_batch(next(iterator), next(fresh))


@pytest.mark.parametrize("make", [mixture, mixed])
def test_processes_share_each_batch(make):
    whole = make().train(3)
    parts = [make().train(3, index, 2) for index in range(2)]
    for _ in range(30):
        for expected, left, right in zip(*(flat(next(stream)) for stream in (whole, *parts)), strict=True):
            assert expected["origin"] == left["origin"] == right["origin"]
            np.testing.assert_array_equal(expected["tokens"], np.concatenate([left["tokens"], right["tokens"]]))


def test_wrong_arguments_are_programming_errors():
    with pytest.raises(ValueError, match="0 or more, got -1"):
        mixture(every=-1)


# ---------------------------------------------------------------- general rows


def general(rows=14, batch=4):
    found = PairPipeline(pairs(rows), small_tokenizer(), CONFIG, batch_size=batch)
    return Pipeline(found.sources, batch, CONFIG, origin="general")


def with_general(share, own=None):
    return WithGeneral(own or Interleaved(*streams(batch=4), every=3), general(), Fraction(share))


def test_general_batches_come_evenly():
    assert kinds(with_general("1/4"), 8) == "tgttmgtt"
    order = kinds(with_general("1/10"), 400)
    for start in range(0, 360, 7):
        for length in (10, 33):
            assert abs(order[start : start + length].count("g") - length / 10) < 2
    assert order.count("g") == 40
    assert order.index("g") == 4
    # Without the general ones, the others are as they were.
    assert order.replace("g", "") == kinds(mixture(every=3), 360)


@pytest.mark.parametrize("share", ["1/10", "1/2", "9/10", "1/3"])
def test_steps_with_general_ones_hold_the_tasks(share):
    mixed = with_general(share)
    order = kinds(mixed, 300)
    for own in range(1, 20):
        steps = mixed.steps_for(own)
        assert mixed.own_steps_in(steps) == order[:steps].count("t") == own
        assert order[steps - 1] != "g", "ends with a batch of the task or its memory"
    assert mixed.own_steps_per_epoch == mixed.own.task.steps_per_epoch
    assert mixed.steps_per_epoch == mixed.steps_for(mixed.own_steps_per_epoch)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_general_batches(processes):
    mixed = with_general("1/3")
    for step in range(9):
        whole = mixed.batch_at(step, seed=1)
        shares = [mixed.batch_at(step, seed=1, process_index=i, process_count=processes) for i in range(processes)]
        assert {share["origin"] for share in shares} == {whole["origin"]}
        for field in ("tokens", "example", "weights"):
            np.testing.assert_array_equal(whole[field], np.concatenate([share[field] for share in shares]))


def test_a_stream_with_general_batches_goes_on_where_it_stopped():
    whole, begun = with_general("1/3").train(1), with_general("1/3").train(1)
    expected = [next(whole) for _ in range(12)]
    for _ in range(7):
        next(begun)
    resumed = with_general("1/3").train(1)
    resumed.set_state(json.loads(json.dumps(begun.get_state())))
    for batch in expected[7:]:
        assert_same_batch(next(resumed), batch)
    for iterator in (whole, begun, resumed):
        iterator.close()


def test_a_pass_over_general_examples_is_shuffled_and_whole():
    mixed = with_general("1/2")
    batches = [mixed.batch_at(step, seed=1) for step in range(16)]
    seen = [batch["example"] for batch in batches if batch["origin"] == "general"]
    assert len(seen) == 8
    for epoch in (seen[:4], seen[4:]):
        examples = np.concatenate(epoch)
        assert sorted(examples[examples >= 0].tolist()) == list(range(14))


def test_a_share_of_tokens_becomes_one_of_batches():
    own, others = streams(batch=4)[0], general(batch=4)
    assert general_share(0.1, "rows", own, others) == Fraction(1, 10)
    share = general_share(0.1, "tokens", own, others)
    tokens = share * others.tokens_per_step
    assert tokens / (tokens + (1 - share) * own.tokens_per_step) == Fraction(1, 10)
    described = WithGeneral(own, others, share).describe()
    assert described["examples"] == 20
    assert described["general"]["examples"] == 14
