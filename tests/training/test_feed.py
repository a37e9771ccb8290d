from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxcl.training.feed import Feed, place_batch
from tests.tiny.trainer import Rows, assert_same, make_rows, one_device


def test_rows_become_a_batch_of_the_right_types() -> None:
    rows = make_rows(0, origin="memory") | {"teacher": {"logits": np.ones((8, 2), np.float16)}, "labels": None}
    batch = place_batch(rows, one_device().batch)
    assert batch.origin == "memory"
    assert batch.predict is None
    assert batch.labels is None
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(batch)} == {"int32", "float32", "float16"}
    np.testing.assert_array_equal(batch.tokens, rows["tokens"])
    np.testing.assert_array_equal(batch.weights, rows["weights"])


def test_unknown_and_missing_fields_are_named() -> None:
    with pytest.raises(ValueError, match="colour"):
        place_batch(make_rows(0) | {"colour": np.zeros(8)}, one_device().batch)
    rows = make_rows(0)
    del rows["targets"]
    with pytest.raises(ValueError, match="targets"):
        place_batch(rows, one_device().batch)


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_the_position_is_that_of_the_last_batch_handed_out(prefetch: int) -> None:
    source = Rows()
    feed = Feed(source, one_device().batch, prefetch=prefetch)
    assert feed.get_state() == {"position": 0}
    for count in (1, 2, 3):
        assert_same(next(feed).tokens, make_rows(count, uneven=True)["tokens"])
        assert feed.get_state() == {"position": count}
        assert source.position == count + prefetch
    feed.set_state({"position": 1})
    assert_same(next(feed).tokens, make_rows(2, uneven=True)["tokens"])


def test_the_end_of_the_data_comes_after_its_last_batch() -> None:
    feed = Feed(Rows(end=4), one_device().batch, prefetch=2)
    assert len(list(feed)) == 4
    assert feed.get_state() == {"position": 4}
    with pytest.raises(StopIteration):
        next(feed)
