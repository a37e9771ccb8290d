import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional.attention_rows import AttentionView
from jaxcl.functional.head_values import ValueTeacher, head_values, value_divergence, write_values
from jaxcl.models.probe import Probe
from tests.methods.test_seekr import (
    BATCH,
    EXACT,
    NETWORK,
    attention_maps,
    make_method,
    records_of,
    remembered,
    teacher_of,
    terms_of,
)
from tests.tiny.networks import init, perturbed

RNG = np.random.default_rng(0)
HEADS = jnp.array([[3, 0], [1, -1], [2, 0]])
QUERIES = jnp.array([[0, 2, 5], [1, 3, -1], [0, 1, 2]])
# The second row has four tokens, the third is padding.
SEGMENTS = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
PLACES = (([3, 0], [0, 2, 5]), ([1], [1, 3]))


def make_view() -> AttentionView:
    query, key, attended = (jnp.asarray(RNG.normal(size=(3, 6, heads, 2)).astype(np.float32)) for heads in (4, 2, 4))
    return AttentionView(query, key, SEGMENTS, True, 0.7, attended=attended)


def test_the_divergence_equals_loops() -> None:
    view, before = make_view(), make_view()
    stored = head_values(before, HEADS, QUERIES)
    values, present = value_divergence(view, ValueTeacher(stored, HEADS, QUERIES))
    assert view.attended is not None
    assert before.attended is not None
    for row, (heads, queries) in enumerate(PLACES):
        found = []
        for head in heads:
            apart = size = 0.0
            for query in queries:
                for now, then in zip(view.attended[row, query, head], before.attended[row, query, head], strict=True):
                    apart, size = apart + float(now - then) ** 2, size + float(then) ** 2
            found.append(apart / size)
        np.testing.assert_allclose(values[row], np.mean(found), rtol=1e-5)
    assert present.tolist() == [True, True, False]
    assert values[2] == 0


def test_no_head_no_query_and_padding_give_zeros() -> None:
    found = head_values(make_view(), HEADS, QUERIES)
    real = np.zeros((3, 2, 3), bool)
    real[0], real[1, 0, :2] = True, True
    assert np.array_equal(np.any(np.asarray(found) != 0, axis=-1), real)


def test_only_heads_of_the_layer_are_written() -> None:
    view = make_view()
    old = jnp.full((3, 2, 3, 2), 7.0, jnp.bfloat16)
    found = write_values(view, ValueTeacher(old, HEADS, QUERIES))
    assert found.dtype == jnp.bfloat16
    assert jnp.all(found[1, 1] == 7)
    assert view.attended is not None
    np.testing.assert_array_equal(found[0, 1], view.attended[0, QUERIES[0], 0].astype(jnp.bfloat16))


def test_a_head_that_gave_nothing_is_left_out() -> None:
    view = make_view()
    stored = head_values(view, HEADS, QUERIES).at[0, 0].set(0.0)
    values, present = value_divergence(view, ValueTeacher(stored, HEADS, QUERIES))
    assert values[0] == 0
    assert present[0]

    def summed(attended: Any) -> Any:
        return value_divergence(view._replace(attended=attended), ValueTeacher(stored, HEADS, QUERIES))[0].sum()

    assert np.isfinite(jax.grad(summed)(view.attended)).all()


def test_a_view_without_values_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"view\.attended: expected what attention gave, got None"):
        head_values(make_view()._replace(attended=None), HEADS, QUERIES)


@pytest.fixture(scope="module")
def params() -> Any:
    return init(NETWORK)


def given(params: Any) -> np.ndarray:
    """What each head gives, `[layers, batch, length, heads, head_dim]`: explicit maps times explicit values."""
    maps = attention_maps(params, BATCH)
    context, x, found = NETWORK.context(BATCH), NETWORK.embed(params, BATCH), []
    for layer in range(NETWORK.num_layers):
        layer_params = jax.tree.map(lambda leaf, layer=layer: leaf[layer], NETWORK.blocks(params))
        value = np.asarray(NETWORK.layer(layer_params.params).project(x, context)[2], np.float64)
        value = np.repeat(value, NETWORK.num_heads // NETWORK.num_kv_heads, axis=2)
        found.append(np.einsum("bhqk,bkhd->bqhd", maps[layer], value))
        x, _ = NETWORK.block(layer_params, x, BATCH)
    return np.stack(found)


def test_the_term_of_remembered_rows_equals_hand_computed(params: Any) -> None:
    batch = dataclasses.replace(BATCH, task=jnp.array([0, 1, 0]))
    method, after = make_method(distil_heads="values"), perturbed(params, 0.1)
    records = records_of(method, params, batch)
    old, new, total = given(params), given(after), 0.0
    for row, record in enumerate(records):
        queries, by_layer = record["queries"], {}
        assert record["values"].shape == (3, 3, NETWORK.head_dim)
        for place, (layer, head) in enumerate(record["heads"]):
            then, now = old[layer, row, queries, head], new[layer, row, queries, head]
            np.testing.assert_allclose(record["values"][place], then, rtol=1e-4, atol=1e-5)
            by_layer.setdefault(int(layer), []).append(np.sum((now - then) ** 2) / np.sum(then**2))
        total += np.mean([np.mean(values) for values in by_layer.values()])
    found = terms_of(method, after, remembered(batch, teacher_of(method, params, records)))["attention"]
    assert total > 1e-3
    np.testing.assert_allclose(found, (total, 3.0, EXACT["attention_weight"]), rtol=1e-3)


def test_values_take_a_vector_per_query(params: Any) -> None:
    rows, values = (
        records_of(make_method(distil_heads=how, store_attention="uint8"), params, BATCH)[0]
        for how in ("rows", "values")
    )
    assert "rows" not in values
    assert values["values"].dtype == np.float32  # the compute dtype
    assert rows["rows"].shape[:2] == values["values"].shape[:2]


def test_what_attention_gave_is_seen_before_gates(params: Any) -> None:
    gates = NETWORK.gates()
    closed = dataclasses.replace(gates, heads=jnp.zeros_like(gates.heads))
    probe = Probe(lambda view, _: view.attended)
    first = [NETWORK.hidden(params, BATCH, gates=one, probe=probe).probed[0] for one in (gates, closed)]
    np.testing.assert_array_equal(*first)
