import jax
import numpy as np

from jaxcl.methods.base import Stored
from jaxcl.training.stored import collate, trim

STORED = {
    "heads": Stored(fill=-1),
    "queries": Stored(("queries",), fill=-1),
    "rows": Stored((None, "queries", "length")),
    "top_ids": Stored(("predict",)),
    "top_values": Stored(("predict",)),
}


def make_record(length: int, queries: list[int], heads: list[tuple[int, int]], predict: int) -> dict[str, np.ndarray]:
    """As `Seekr.signals` gives a row of 6 tokens, 4 queries and 3 scored positions; every number tells its place."""
    rows = np.full((len(heads), 4, 6), 99, np.uint8)
    for number, (layer, head) in enumerate(heads):
        for place in range(len(queries)):
            rows[number, place, :length] = 1 + 10 * (4 * layer + head) + place
    values = np.arange(3 * 2, dtype=np.float32).reshape(3, 2)
    values[predict:] = 99
    return {
        "heads": np.array(heads, np.int16),
        "queries": np.array(queries + [-1] * (4 - len(queries)), np.int32),
        "rows": rows,
        "top_ids": values.astype(np.int32),
        "top_values": -values,
    }


ONE = make_record(5, [0, 2, 4], [(0, 1), (2, 0), (2, 3)], 2)
OTHER = make_record(3, [1, 2], [(1, 1), (1, 2), (2, 0)], 3)
TRIMMED = trim(ONE, STORED, length=5, predict=2), trim(OTHER, STORED, length=3, predict=3)


def test_padding_is_not_stored() -> None:
    assert {name: value.shape for name, value in TRIMMED[0].items()} == {
        "heads": (3, 2),
        "queries": (3,),
        "rows": (3, 3, 5),
        "top_ids": (2, 2),
        "top_values": (2, 2),
    }
    assert not any(np.any(np.abs(value) == 99) for value in TRIMMED[0].values())


def test_an_array_that_is_not_named_is_stored_whole() -> None:
    record = {"queries": np.array([3, -1]), "mean": np.arange(4.0)}
    stored = trim(record, {"queries": STORED["queries"]}, length=2, predict=1)
    assert {name: value.tolist() for name, value in stored.items()} == {"queries": [3], "mean": [0.0, 1.0, 2.0, 3.0]}


def test_records_come_back_in_their_places_and_rows_that_only_fill_hold_the_fill() -> None:
    sizes = {"heads": (3, 2), "queries": (4,), "rows": (3, 4, 7), "top_ids": (4, 2), "top_values": (4, 2)}
    shapes = {name: jax.ShapeDtypeStruct((1, *size), ONE[name].dtype) for name, size in sizes.items()}
    batch = collate([*TRIMMED, None], STORED, shapes)
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        name: ((3, *size), ONE[name].dtype) for name, size in sizes.items()
    }
    assert batch["heads"].tolist() == [[[0, 1], [2, 0], [2, 3]], [[1, 1], [1, 2], [2, 0]], [[-1, -1]] * 3]
    assert batch["queries"].tolist() == [[0, 2, 4, -1], [1, 2, -1, -1], [-1] * 4]
    for row, record, length, predict in ((0, ONE, 5, 2), (1, OTHER, 3, 3)):
        for number, (layer, head) in enumerate(record["heads"]):
            for place, query in enumerate(batch["queries"][row]):
                expected = np.zeros(7)
                if query >= 0:
                    expected[:length] = 1 + 10 * (4 * layer + head) + place
                np.testing.assert_array_equal(batch["rows"][row, number, place], expected)
        np.testing.assert_array_equal(batch["top_values"][row, :predict], record["top_values"][:predict])
        np.testing.assert_array_equal(batch["top_values"][row, predict:], 0)
    assert not any(np.any(batch[name][2]) for name in ("rows", "top_ids", "top_values"))
