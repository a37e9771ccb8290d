import numpy as np

from jaxcl.methods.teacher import collate_records, trim_record


def make_record(length: int, queries: list[int], heads: list[tuple[int, int]], predicted: int) -> dict[str, np.ndarray]:
    """As `Seekr.signals` gives a row of 6 tokens, 4 queries and 3 scored positions; every number tells its place."""
    rows = np.zeros((len(heads), 4, 6), np.uint8)
    for number, (layer, head) in enumerate(heads):
        for place in range(len(queries)):
            rows[number, place, :length] = 1 + 10 * (4 * layer + head) + place
    padded = np.array(queries + [-1] * (4 - len(queries)), np.int32)
    values = np.arange(3 * 2, dtype=np.float32).reshape(3, 2)
    values[predicted:] = 99
    return {
        "heads": np.array(heads, np.int16),
        "queries": padded,
        "rows": rows,
        "length": np.array(length, np.int32),
        "predicted": np.array(predicted, np.int32),
        "top_ids": values.astype(np.int32),
        "top_values": -values,
    }


ONE = make_record(5, [0, 2, 4], [(0, 1), (2, 0), (2, 3)], 2)
OTHER = make_record(3, [1, 2], [(1, 1), (1, 2), (2, 0)], 3)


def test_padding_is_not_stored() -> None:
    stored = trim_record(ONE)
    assert {name: value.shape for name, value in stored.items()} == {
        "heads": (3, 2),
        "queries": (3,),
        "rows": (3, 3, 5),
        "top_ids": (2, 2),
        "top_values": (2, 2),
    }
    assert np.all(stored["rows"] > 0)
    assert not np.any(stored["top_ids"] == 99)


def test_records_come_back_in_their_places() -> None:
    filler = {name: np.zeros_like(value) for name, value in trim_record(ONE).items()}
    batch = collate_records([trim_record(ONE), trim_record(OTHER), filler], queries=4, length=7, predict=4)
    assert batch["rows"].shape == (3, 3, 4, 7)
    assert batch["rows"].dtype == np.uint8
    assert batch["heads"][:2].tolist() == [[[0, 1], [2, 0], [2, 3]], [[1, 1], [1, 2], [2, 0]]]
    assert batch["queries"].tolist()[:2] == [[0, 2, 4, -1], [1, 2, -1, -1]]
    for row, record, length in ((0, ONE, 5), (1, OTHER, 3)):
        for number, (layer, head) in enumerate(record["heads"]):
            for place, query in enumerate(batch["queries"][row]):
                expected = np.zeros(7)
                if query >= 0:
                    expected[:length] = 1 + 10 * (4 * layer + head) + place
                np.testing.assert_array_equal(batch["rows"][row, number, place], expected)
        kept = int(record["predicted"])
        np.testing.assert_array_equal(batch["top_values"][row, :kept], record["top_values"][:kept])
        np.testing.assert_array_equal(batch["top_values"][row, kept:], 0)
    assert not np.any(batch["rows"][2])
    assert np.all(batch["heads"][2] == -1)
    assert np.all(batch["queries"][2] == -1)


def test_exact_outputs_are_records_too() -> None:
    record = {**ONE, "scores": np.ones((3, 9), np.float32)}
    del record["top_ids"], record["top_values"]
    batch = collate_records([trim_record(record)], queries=4, length=6, predict=5)
    assert batch["scores"].shape == (1, 5, 9)
    assert batch["scores"].sum() == 18
