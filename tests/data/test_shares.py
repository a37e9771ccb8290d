import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcl.data.shares import Shares

WEIGHTS = st.lists(st.floats(0.001, 100.0), min_size=1, max_size=6)


@given(weights=WEIGHTS, start=st.integers(0, 10**15), count=st.integers(0, 60))
@settings(deadline=None, max_examples=100)
def test_every_window_has_the_shares(weights, start, count):
    shares = Shares(weights)
    first, last = shares.before(start), shares.before(start + count)
    found = [new - old for old, new in zip(first, last, strict=True)]
    assert sum(found) == count
    assert min(found) >= 0
    for share, before, inside in zip(shares.shares, first, found, strict=True):
        assert abs(before - share * start) < len(weights)
        assert abs(inside - share * count) < 2 * len(weights)


@given(weights=WEIGHTS)
@settings(deadline=None, max_examples=50)
def test_each_place_has_one_source_and_its_number_in_it(weights):
    shares = Shares(weights)
    counts = [0] * len(weights)
    for place in range(80):
        assert shares.before(place) == counts
        source, number = shares.at(place)
        assert number == counts[source]
        counts[source] += 1


def test_shares_are_as_they_are_written():
    """As binary fractions, 0.1 and 0.9 would miss the one place of ten in the long run."""
    assert Shares([0.1, 0.9]).before(10**20) == [10**19, 9 * 10**19]
    assert [Shares([0.1, 0.9]).at(place)[0] for place in range(10)] == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("weights", [[], [0.0, 1.0], [-1.0, 2.0]])
def test_weights_are_above_0(weights):
    with pytest.raises(ValueError, match="numbers above 0"):
        Shares(weights)
