"""What is remembered, against the definition of each way to choose."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcl.data.choosing import count_fitting, equal_shares, priorities, rank_examples, reservoir_counts

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@given(st.integers(0, 60), COUNTS)
def test_equal_shares_are_what_dealing_one_after_another_gives(budget: int, totals: list[int]) -> None:
    dealt = [0] * len(totals)
    left = budget
    while left and dealt != totals:
        for task, total in enumerate(totals):
            if left and dealt[task] < total:
                dealt[task] += 1
                left -= 1
    assert equal_shares(budget, totals) == dealt


@given(st.integers(0, 60), COUNTS)
def test_no_share_grows_when_tasks_come_and_only_what_is_kept_is_known(budget: int, totals: list[int]) -> None:
    kept: list[int] = []
    for total in totals:
        after = equal_shares(budget, [*kept, total])
        assert all(now <= before for now, before in zip(after, kept, strict=False))
        kept = after
    assert kept == equal_shares(budget, totals)


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(0, 60))
def test_as_many_first_examples_fit_as_do_not_exceed_the_room(costs: list[int], room: int) -> None:
    count = count_fitting(np.array(costs, np.int64), room)
    assert sum(costs[:count]) <= room
    assert count == len(costs) or sum(costs[: count + 1]) > room


@given(COUNTS, st.integers(1, 40), st.integers(0, 9), st.booleans())
def test_a_reservoir_holds_the_smallest_priorities_of_all_seen(
    counts: list[int], budget: int, seed: int, sized: bool
) -> None:
    """Task by task, of what is still kept; against a choice from all examples at once."""
    drawn = [np.sort(priorities(count, seed=seed, task=task)) for task, count in enumerate(counts)]
    costs = [
        1 + (np.arange(count) * 7 + task) % 5 if sized else np.ones(count, int) for task, count in enumerate(counts)
    ]
    sizes: list[int] = []
    limit = None
    for last in range(len(counts)):
        now = [one[:size] for one, size in zip([*drawn[:last], drawn[last]], [*sizes, counts[last]], strict=True)]
        of = [one[:size] for one, size in zip(costs, [*sizes, counts[last]], strict=False)]
        sizes, limit = reservoir_counts(now, of, budget, limit)
    together = sorted(
        (float(one), int(cost), task)
        for task in range(len(counts))
        for one, cost in zip(drawn[task], costs[task], strict=True)
    )
    expected: Counter[int] = Counter()
    room = budget
    for _, cost, task in together:
        room -= cost
        if room < 0:
            break
        expected[task] += 1
    assert sizes == [expected[task] for task in range(len(counts))]


def test_every_example_of_a_reservoir_is_kept_with_the_same_probability() -> None:
    """40 of 60 + 20 + 120 examples: 12, 4 and 24 on average, whenever a task came."""
    kept = []
    for seed in range(400):
        drawn = [np.sort(priorities(count, seed=seed, task=task)) for task, count in enumerate((60, 20, 120))]
        kept.append(reservoir_counts(drawn, [np.ones(len(one), int) for one in drawn], 40, None)[0])
    deviation = np.std(kept, axis=0) / np.sqrt(len(kept))
    assert (abs(np.mean(kept, axis=0) - [12, 4, 24]) < 4 * deviation).all()


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 5))
def test_any_beginning_of_a_balanced_order_has_each_answer_equally_often(answers: list[int], seed: int) -> None:
    order = rank_examples("balanced", len(answers), seed=seed, task=1, answers=answers).tolist()
    assert sorted(order) == list(range(len(answers)))
    available = Counter(answers)
    drawn = priorities(len(answers), seed=seed, task=1)
    for size in range(len(answers) + 1):
        found = Counter(answers[number] for number in order[:size])
        most = max(found.values(), default=0)
        # An answer that is there less often than another one by two has no more examples.
        assert all(found[one] >= most - 1 or found[one] == available[one] for one in available)
    for answer in available:  # within an answer, by priority
        own = [number for number in order if answers[number] == answer]
        assert own == sorted(own, key=lambda number: drawn[number])


def test_without_answers_and_for_a_reservoir_priorities_decide() -> None:
    drawn = priorities(50, seed=4, task=2)
    by_priority = sorted(range(50), key=lambda number: drawn[number])
    for choose in ("random", "reservoir", "balanced"):
        assert rank_examples(choose, 50, seed=4, task=2).tolist() == by_priority
    assert len({tuple(rank_examples("random", 50, seed=s, task=t).tolist()) for s in range(3) for t in range(3)}) == 9


def test_the_highest_losses_come_first_and_equal_ones_in_order() -> None:
    order = rank_examples("highest_loss", 5, seed=0, task=0, losses=np.array([1.0, 3.0, 2.0, 3.0, 1.0]))
    assert order.tolist() == [1, 3, 2, 0, 4]
    with pytest.raises(ValueError, match="got newest"):
        rank_examples("newest", 5, seed=0, task=0)
    with pytest.raises(ValueError, match="losses"):
        rank_examples("highest_loss", 5, seed=0, task=0)
