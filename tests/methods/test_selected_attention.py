import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional import attention_distillation as module
from jaxcl.functional.attention_distillation import AttentionTeacher, attention_divergence, write_rows
from jaxcl.functional.attention_rows import (
    AttentionView,
    CodedRows,
    decode_rows,
    encode_rows,
    sample_queries,
    selected_rows,
)
from tests.tiny.networks import log_softmax

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True, params=[1, 128], ids=["blocks", "whole"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries of these tests one a block, and all at once."""
    monkeypatch.setattr(module, "_BLOCK", request.param)


@pytest.fixture(scope="module", params=[(True, None, None), (False, None, None), (True, 3, 0.8)])
def view(request: pytest.FixtureRequest) -> AttentionView:
    causal, window, cap = request.param
    query = RNG.normal(size=(3, 6, 4, 2)).astype(np.float32)
    key = RNG.normal(size=(3, 6, 2, 2)).astype(np.float32)
    segments = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    return AttentionView(jnp.asarray(query), jnp.asarray(key), jnp.asarray(segments), causal, 0.7, window, cap)


def brute_row(view: AttentionView, row: int, head: int, query: int) -> np.ndarray:
    keys = [
        key
        for key in range(6)
        if view.segments[row, key] == view.segments[row, query] and (key <= query or not view.causal)
        if view.window is None or abs(query - key) < view.window
    ]
    group = view.query.shape[2] // view.key.shape[2]
    scores = np.array([np.dot(view.query[row, query, head], view.key[row, key, head // group]) for key in keys]) * 0.7
    scores = scores if view.cap is None else view.cap * np.tanh(scores / view.cap)
    out = np.zeros(6)
    out[keys] = np.exp(log_softmax(scores))
    return out


HEADS = jnp.array([[3, 0], [1, -1], [2, 0]])
QUERIES = jnp.array([[0, 2, 5], [1, 3, -1], [0, 1, 2]])


def test_attention_divergence_equals_numpy(view: AttentionView) -> None:
    teacher = view._replace(query=view.query * 1.3 + 0.2)
    stored = selected_rows(teacher, HEADS, QUERIES)
    values, present = attention_divergence(view, AttentionTeacher(stored, HEADS, QUERIES))
    assert present.tolist() == [True, True, False]
    for row, heads, queries in ((0, [3, 0], [0, 2, 5]), (1, [1], [1, 3])):
        expected = []
        for head in heads:
            for query in queries:
                p, s = brute_row(teacher, row, head, query), brute_row(view, row, head, query)
                expected.append(np.sum(p[p > 0] * np.log(p[p > 0] / s[p > 0])))
        np.testing.assert_allclose(values[row], np.mean(expected), rtol=1e-4, atol=1e-6)
        assert values[row] > 1e-4
    assert values[2] == 0


def test_attention_divergence_of_equal_rows_is_zero(view: AttentionView) -> None:
    stored = selected_rows(view, HEADS, QUERIES)

    def total(query: jax.Array, rows: jax.Array) -> jax.Array:
        teacher = AttentionTeacher(rows, HEADS, QUERIES)
        return jnp.sum(attention_divergence(view._replace(query=query), teacher)[0])

    value, gradient = jax.value_and_grad(total)(view.query, stored)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    assert total(view.query, encode_rows(stored)) < 1e-4
    moved = total(view.query * 1.3 + 0.2, stored)
    assert moved > 1e-3
    np.testing.assert_allclose(total(view.query * 1.3 + 0.2, encode_rows(stored)), moved, rtol=0.05)


def test_attention_divergence_is_finite_where_the_student_sees_nothing_of_it() -> None:
    query = jnp.array([[[[0.0]], [[200.0]]]])
    view = AttentionView(query, jnp.array([[[[1.0]], [[-1.0]]]]), jnp.ones((1, 2), jnp.int32), True, 1.0)
    teacher = AttentionTeacher(jnp.array([[[[0.0, 1.0]]]]), jnp.array([[0]]), jnp.array([[1]]))
    value, gradient = jax.value_and_grad(lambda query: attention_divergence(view._replace(query=query), teacher)[0][0])(
        query
    )
    assert np.isfinite(value)
    assert value > 80
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("coded", [False, True])
def test_gradients_are_those_of_the_formula(view: AttentionView, coded: bool) -> None:
    """Against automatic differentiation of the divergence spelled out, one row at a time."""
    stored = selected_rows(view._replace(query=view.query * 1.3 + 0.2), HEADS, QUERIES)
    stored = encode_rows(stored) if coded else stored
    weights = np.asarray(decode_rows(stored) if coded else stored, np.float32)
    factors = jnp.array([2.0, -3.0, 5.0])

    def by_formula(query: jax.Array, key: jax.Array) -> jax.Array:
        total = jnp.float32(0)
        for row, heads, queries in ((0, (0, 1), (0, 1, 2)), (1, (0,), (0, 1))):
            for h in heads:
                for q in queries:
                    head, position = int(HEADS[row, h]), int(QUERIES[row, q])
                    keys = np.flatnonzero(brute_row(view, row, head, position))
                    scores = key[row, keys, head // 2] @ query[row, position, head] * view.scale
                    scores = scores if view.cap is None else view.cap * jnp.tanh(scores / view.cap)
                    p = weights[row, h, q, keys]
                    logs = np.log(p, where=p > 0, out=np.zeros_like(p)) - jax.nn.log_softmax(scores)
                    total += factors[row] * jnp.sum(p * logs) / (len(heads) * len(queries))
        return total

    def found(query: jax.Array, key: jax.Array) -> jax.Array:
        moved = view._replace(query=query, key=key)
        return jnp.sum(factors * attention_divergence(moved, AttentionTeacher(stored, HEADS, QUERIES))[0])

    expected, gradients = (
        jax.value_and_grad(f, argnums=(0, 1))(view.query, view.key) for f in (by_formula, jax.jit(found))
    )
    np.testing.assert_allclose(gradients[0], expected[0], rtol=1e-5)
    assert np.abs(expected[1][0]).max() > 1e-2
    for one, other in zip(gradients[1], expected[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_rows_are_written_in_the_places_of_the_layer_s_heads(view: AttentionView) -> None:
    plain = jnp.full((3, 2, 3, 6), 7.0)
    for before in (CodedRows(plain.astype(jnp.uint8), plain[..., 0]), plain):
        exact = selected_rows(view, HEADS, QUERIES)
        expected = encode_rows(exact) if isinstance(before, CodedRows) else exact
        found = write_rows(view, AttentionTeacher(before, HEADS, QUERIES))
        assert jax.tree.map(lambda one: one.dtype, found) == jax.tree.map(lambda one: one.dtype, before)
        for one, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            real = (HEADS >= 0).reshape(3, 2, *[1] * (one.ndim - 2))
            np.testing.assert_allclose(one, np.where(real, wanted, 7), atol=1e-6)


def test_an_example_without_heads_is_untouched_by_those_of_others() -> None:
    """Its scores would overflow an exponential that nothing is taken from."""
    query = jnp.full((2, 2, 1, 1), 200.0)
    view = AttentionView(query, jnp.ones((2, 2, 1, 1)), jnp.ones((2, 2), jnp.int32), True, 1.0)
    teacher = AttentionTeacher(jnp.array([[[[1.0, 0.0]]]] * 2), jnp.array([[0], [-1]]), jnp.array([[1], [1]]))
    values, gradient = jax.value_and_grad(
        lambda query: jnp.sum(attention_divergence(view._replace(query=query), teacher)[0])
    )(query)
    np.testing.assert_allclose(values, np.log(2), rtol=1e-5)
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[1])


@pytest.mark.parametrize("budget", [0, 7])
@pytest.mark.parametrize("lengths", [(12, 9), (12, 3)])
def test_sampled_queries_lose_no_key(budget: int, lengths: tuple[int, int]) -> None:
    """Values and gradients equal those of a dense softmax over all positions, whatever is drawn."""
    segments = jnp.asarray((np.arange(12) < np.array(lengths)[:, None]).astype(np.int32))
    query, key, other = (jnp.asarray(RNG.normal(size=(2, 12, 2, 3)), jnp.float32) for _ in range(3))
    queries = sample_queries(jax.random.split(jax.random.key(3)), segments, budget)
    heads = jnp.array([[1, 0], [0, 1]])
    stored = selected_rows(AttentionView(other, key, segments, True, 0.7), heads, queries)

    def found(query: jax.Array, key: jax.Array) -> jax.Array:
        view = AttentionView(query, key, segments, True, 0.7)
        return attention_divergence(view, AttentionTeacher(stored, heads, queries))[0]

    def dense(query: jax.Array, key: jax.Array) -> jax.Array:
        seen = jnp.tril(jnp.ones((12, 12), bool))[None] & (segments[:, None] != 0) & (segments[:, :, None] != 0)
        scores = jnp.where(seen[:, None], jnp.einsum("bqhd,bkhd->bhqk", query, key) * 0.7, -1e30)
        logs = jax.nn.log_softmax(scores)
        rows = jnp.stack([logs[row, heads[row]][:, queries[row]] for row in range(2)])
        weight = (queries >= 0)[:, None]
        each = jnp.sum(jnp.where(stored > 0, stored * (jnp.log(jnp.maximum(stored, 1e-37)) - rows), 0), axis=-1)
        return jnp.sum(each * weight, axis=(1, 2)) / (2 * jnp.sum(weight, axis=(1, 2)))

    np.testing.assert_allclose(found(query, key), dense(query, key), rtol=1e-5, atol=1e-6)
    for argument in (0, 1):
        gradients = [jax.grad(lambda *args, one=one: one(*args).sum(), argument)(query, key) for one in (found, dense)]
        np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_the_last_token_keeps_its_gradient_where_fewer_queries_are_asked_than_there_is_room_for() -> None:
    length, segments = 6, jnp.ones((1, 6), jnp.int32)
    query, key = (jnp.asarray(RNG.normal(size=(1, length, 2, 4)), jnp.float32) for _ in range(2))
    heads = jnp.array([[0, 1]])

    def slope(queries: list[int]) -> jax.Array:
        asked = jnp.array([queries])
        rows = selected_rows(AttentionView(query + 1.0, key, segments, True, 0.5), heads, asked)
        teacher = AttentionTeacher(rows, heads, asked)

        def total(query: jax.Array) -> jax.Array:
            return attention_divergence(AttentionView(query, key, segments, True, 0.5), teacher)[0].sum()

        return jax.grad(total)(query)

    exact = slope([0, 1, 2, 3, 4, 5])
    assert np.all(np.abs(exact[0, 5]).sum(axis=-1) > 0)
    np.testing.assert_allclose(slope([0, 1, 2, 3, 4, 5, -1, -1]), exact, rtol=1e-5, atol=1e-7)


def test_a_query_that_comes_twice_counts_once() -> None:
    segments, heads = jnp.ones((1, 6), jnp.int32), jnp.array([[0, 1]])
    query, key = (jnp.asarray(RNG.normal(size=(1, 6, 2, 4)), jnp.float32) for _ in range(2))

    def both(queries: list[int]) -> tuple[jax.Array, jax.Array]:
        asked = jnp.array([queries])
        rows = selected_rows(AttentionView(query + 1.0, key, segments, True, 0.5), heads, asked)
        teacher = AttentionTeacher(rows, heads, asked)

        def total(query: jax.Array) -> jax.Array:
            return attention_divergence(AttentionView(query, key, segments, True, 0.5), teacher)[0].sum()

        return jax.value_and_grad(total)(query)

    for one, other in zip(both([2, 4, 4]), both([2, 4]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
