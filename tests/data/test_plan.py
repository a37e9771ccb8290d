import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl.data.plan import choose_lengths, plan_epoch, plan_steps

GROUPS = (0, 0, 0, 1)  # three shapes of one kind, one of another


@given(
    buckets=st.lists(st.integers(0, 3), min_size=1, max_size=80),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 5),
    epoch=st.none() | st.integers(0, 5),
)
def test_every_example_stands_once_in_a_bucket_it_fits(buckets, batch_size, seed, epoch):
    buckets = np.array(buckets)
    plan = plan_epoch(buckets, GROUPS, batch_size, seed, epoch)
    assert plan.rows.shape == (plan_steps(buckets, GROUPS, batch_size), batch_size)
    real = plan.rows[plan.rows >= 0]
    assert sorted(real) == list(range(len(buckets)))
    for shape, row in zip(plan.shapes, plan.rows, strict=True):
        members = row[row >= 0]
        assert len(members) > 0, "a batch of nothing but fillers"
        assert (row[: len(members)] >= 0).all(), "fillers stand last"
        assert all(buckets[member] <= shape and GROUPS[buckets[member]] == GROUPS[shape] for member in members)
    # At most one unfilled batch a group.
    unfilled = plan.shapes[(plan.rows < 0).any(axis=1)]
    assert len({GROUPS[shape] for shape in unfilled}) == len(unfilled)


def test_the_plan_depends_on_seed_and_epoch_and_nothing_else():
    buckets = np.arange(60) % 4
    plans = {
        (seed, epoch): plan_epoch(buckets, GROUPS, 4, seed, epoch).rows.tolist()
        for seed, epoch in itertools.product((0, 1), (0, 1))
    }
    assert plans[0, 1] == plan_epoch(buckets, GROUPS, 4, 0, 1).rows.tolist()
    assert len({str(rows) for rows in plans.values()}) == 4
    ordered = plan_epoch(buckets, GROUPS, 4, 0, None)
    assert ordered.rows[:3].tolist() == [[0, 4, 8, 12], [16, 20, 24, 28], [32, 36, 40, 44]]


def padded(lengths, chosen):
    return sum(min(limit for limit in chosen if limit >= length) for length in lengths)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=15),
    buckets=st.integers(1, 3),
    multiple=st.sampled_from([1, 4]),
)
def test_chosen_lengths_pad_least_of_all_choices(lengths, buckets, multiple):
    chosen = choose_lengths(np.array(lengths), buckets, multiple)
    assert len(chosen) <= buckets
    assert list(chosen) == sorted(set(chosen))
    assert all(length % multiple == 0 for length in chosen)
    candidates = sorted({-(-length // multiple) * multiple for length in lengths})
    best = min(
        padded(lengths, choice)
        for size in range(1, buckets + 1)
        for choice in itertools.combinations(candidates, min(size, len(candidates)))
        if choice[-1] == candidates[-1]
    )
    assert padded(lengths, chosen) == best


def test_no_examples_is_a_programming_error():
    with pytest.raises(ValueError, match="at least one example"):
        choose_lengths(np.zeros(0, int), 2, 4)
