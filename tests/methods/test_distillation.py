from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxcl.functional.attention_distillation import example_divergence
from jaxcl.functional.attention_rows import decode_rows, encode_rows, sample_queries
from jaxcl.functional.distillation import TopScores, full_divergence, top_divergence, top_scores
from tests.tiny.networks import log_softmax

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def logits() -> tuple[np.ndarray, np.ndarray]:
    teacher = RNG.normal(0, 2, (3, 4, 9)).astype(np.float32)
    return teacher, teacher + RNG.normal(0, 0.5, teacher.shape).astype(np.float32)


def kl(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """From log-probabilities."""
    return (np.exp(teacher) * (teacher - student)).sum(-1)


def test_full_divergence_equals_numpy(logits: tuple[np.ndarray, np.ndarray]) -> None:
    teacher, student = (log_softmax(x) for x in logits)
    found = full_divergence(jnp.asarray(teacher, jnp.float32), jnp.asarray(logits[1]))
    np.testing.assert_allclose(found, kl(teacher, student), rtol=1e-4)


@pytest.mark.parametrize("top", [1, 3, 8, 9])
def test_top_divergence_equals_numpy_over_merged_outcomes(logits: tuple[np.ndarray, np.ndarray], top: int) -> None:
    teacher, student = (log_softmax(x) for x in logits)
    order = np.argsort(-teacher, axis=-1)
    merged = []
    for logs in (teacher, student):
        ordered = np.take_along_axis(logs, order, -1)
        rest = np.exp(ordered[..., top:]).sum(-1, keepdims=True)
        merged.append(np.concatenate([ordered[..., :top], np.log(np.maximum(rest, 1e-300))], -1))
    stored = top_scores(jnp.asarray(logits[0]), top)
    assert stored.ids.dtype == jnp.int32
    np.testing.assert_array_equal(stored.ids, order[..., :top])
    found = top_divergence(stored, jnp.asarray(logits[1]))
    np.testing.assert_allclose(found, kl(*merged), rtol=1e-3, atol=1e-6)
    assert np.all(found <= kl(teacher, student) * (1 + 1e-4) + 1e-6)


@pytest.mark.parametrize("top", [1, 4, 9])
def test_divergence_of_a_model_with_itself_is_zero(logits: tuple[np.ndarray, np.ndarray], top: int) -> None:
    own = jnp.asarray(logits[0])
    np.testing.assert_allclose(top_divergence(top_scores(own, top), own), 0.0, atol=2e-6)
    np.testing.assert_allclose(full_divergence(jax.nn.log_softmax(own), own), 0.0, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(top_divergence(top_scores(own, top), x)))(own)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_gradient_of_top_divergence_equals_probabilities_apart(logits: tuple[np.ndarray, np.ndarray]) -> None:
    # Over merged outcomes the gradient of a score is s_j - p_j for a listed token; the rest share theirs.
    teacher, student = (np.exp(log_softmax(x)) for x in logits)
    gradient = np.asarray(
        jax.grad(lambda x: jnp.sum(top_divergence(top_scores(jnp.asarray(logits[0]), 3), x)))(jnp.asarray(logits[1]))
    )
    listed = np.argsort(-teacher, axis=-1)[..., :3]
    difference = np.take_along_axis(student - teacher, listed, -1)
    np.testing.assert_allclose(np.take_along_axis(gradient, listed, -1), difference, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(gradient.sum(-1), 0.0, atol=1e-5)


def with_lots(logits: np.ndarray, top: int, drawn: int, count: int) -> Any:
    """Scores of `count` draws whose places in the parts are evenly spread, leading axis `count`."""
    spread = jnp.broadcast_to(jnp.asarray(logits), (count, *logits.shape))
    lots = jnp.broadcast_to(
        ((jnp.arange(count) + 0.5) / count).reshape(-1, *[1] * (logits.ndim - 1)), spread.shape[:-1]
    )
    return top_scores(spread, top, drawn, lots)


@pytest.mark.parametrize(("top", "drawn"), [(1, 1), (3, 4), (7, 20)])
def test_tokens_are_drawn_from_the_rest_by_their_probability(
    logits: tuple[np.ndarray, np.ndarray], top: int, drawn: int
) -> None:
    logs = log_softmax(logits[0])
    found = with_lots(logits[0], top, drawn, 2000)
    assert found.drawn_ids.dtype == jnp.int32
    expected = np.take_along_axis(np.broadcast_to(logs, (2000, *logs.shape)), np.asarray(found.drawn_ids), -1)
    np.testing.assert_allclose(found.drawn_values, expected, rtol=1e-4)
    for place in np.ndindex(logs.shape[:-1]):
        counts = np.bincount(np.asarray(found.drawn_ids)[(slice(None), *place)].ravel(), minlength=logs.shape[-1])
        rest = np.exp(logs[place])
        rest[np.argsort(-logs[place])[:top]] = 0
        np.testing.assert_allclose(counts / counts.sum(), rest / rest.sum(), atol=2e-3)
        assert not counts[rest == 0].any()


@pytest.mark.parametrize(("top", "drawn"), [(1, 1), (3, 4), (7, 20)])
def test_with_drawn_tokens_divergence_and_gradient_are_the_full_ones_on_average(
    logits: tuple[np.ndarray, np.ndarray], top: int, drawn: int
) -> None:
    stored, student = with_lots(logits[0], top, drawn, 2000), jnp.asarray(logits[1])

    def mean(student: jax.Array) -> jax.Array:
        return jnp.mean(top_divergence(stored, jnp.broadcast_to(student, (2000, *student.shape))), axis=0)

    full = kl(log_softmax(logits[0]), log_softmax(logits[1]))
    np.testing.assert_allclose(mean(student), full, rtol=5e-3, atol=5e-3)
    expected = np.exp(log_softmax(logits[1])) - np.exp(log_softmax(logits[0]))
    gradient = jax.grad(lambda student: jnp.sum(mean(student)))(student)
    np.testing.assert_allclose(gradient, expected, atol=2e-3)
    own = top_divergence(stored, jnp.broadcast_to(jnp.asarray(logits[0]), (2000, *student.shape)))
    np.testing.assert_allclose(own, 0.0, atol=2e-6)


def test_where_the_likeliest_leave_nothing_draws_do_no_harm() -> None:
    sure, other = jnp.array([200.0, 0.0, 0.0]), jnp.array([0.0, 60.0, 0.0])
    stored = top_scores(sure, 1, 2, jnp.float32(0.3))
    value, gradient = jax.value_and_grad(lambda x: top_divergence(stored, x))(other)
    np.testing.assert_allclose(value, 60.0, rtol=1e-3)
    assert np.all(np.isfinite(gradient))


def test_top_divergence_stays_finite_for_sure_models() -> None:
    sure, other = jnp.array([60.0, 0.0, 0.0]), jnp.array([0.0, 60.0, 0.0])
    value, gradient = jax.value_and_grad(lambda x: top_divergence(top_scores(sure, 1), x))(other)
    np.testing.assert_allclose(value, 60.0, rtol=0.3)
    assert np.all(np.isfinite(gradient))


rows = st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8).filter(lambda x: sum(x) > 1e-3)


@settings(max_examples=50, deadline=None)
@given(rows)
def test_coded_rows_come_back_close(values: list[float]) -> None:
    row = np.array([values], np.float64)
    row /= row.sum()
    # The others' sum is known to half a step of float32 below 1; a sum of that size is the next test's.
    assume(not 0 < 1 - row.max() < 1e-5)
    coded = encode_rows(jnp.asarray(row, jnp.float32))
    assert coded.codes.dtype == jnp.uint8
    found = np.asarray(decode_rows(coded), np.float64)
    np.testing.assert_allclose(found.sum(-1), 1.0, rtol=1e-5)
    assert np.all(found[row == 0] == 0)
    first, second = np.argmax(row), np.sort(row[0])[-2]
    np.testing.assert_allclose(found[0, first], row[0, first], rtol=1e-6)
    # Half a step of the root, a 508th of the second largest root; scaling adds the error of the others' sum.
    assert np.abs(np.sqrt(found) - np.sqrt(row)).max() <= 1.5 * np.sqrt(second) / 254 + 1e-6


@pytest.mark.parametrize("small", [1e-8, 1e-6])
def test_what_float32_does_not_resolve_beside_the_largest_is_all_that_is_lost(small: float) -> None:
    row = np.array([[1.0 - small, small, 0.0]])
    found = np.asarray(decode_rows(encode_rows(jnp.asarray(row, jnp.float32))), np.float64)
    np.testing.assert_allclose(found, row, atol=6e-8)


def test_rows_of_zeros_stay() -> None:
    zeros = jnp.zeros((2, 5))
    np.testing.assert_array_equal(decode_rows(encode_rows(zeros)), 0.0)


@pytest.mark.parametrize(
    ("length", "sink", "power"), [(1536, 0.99, 0), (1536, 0.995, 0), (1536, 0.95, 1), (4096, 0.98, 0)]
)
def test_a_student_equal_to_its_teacher_diverges_by_nothing_where_one_token_has_nearly_all_weight(
    length: int, sink: float, power: float
) -> None:
    tail = np.arange(1, length, dtype=np.float64) ** -power
    row = np.concatenate([[sink], (1 - sink) * tail / tail.sum()])[None]
    coded = np.asarray(decode_rows(encode_rows(jnp.asarray(row, jnp.float32))), np.float64)
    np.testing.assert_allclose(coded[0, 1:].sum(), 1 - sink, rtol=1e-4)
    assert (coded * (np.log(np.maximum(coded, 1e-300)) - np.log(row))).sum() <= 1e-4


def test_coding_loses_little_information() -> None:
    # Long rows with a heavy tail, of which a linear code would lose most.
    scores = RNG.normal(0, 2, (64, 1000))
    exact = np.exp(log_softmax(scores))
    coded = np.asarray(decode_rows(encode_rows(jnp.asarray(exact, jnp.float32))), np.float64)
    student = log_softmax(scores + RNG.normal(0, 0.3, scores.shape))
    logs = np.log(np.maximum(coded, 1e-300))
    lost = (np.where(coded > 0, coded * (logs - student), 0)).sum(-1).mean() / kl(np.log(exact), student).mean() - 1
    assert abs(lost) < 0.01


def test_layers_without_heads_do_not_count() -> None:
    means = jnp.array([[1.0, 2.0, 5.0], [3.0, 9.0, 5.0], [4.0, 9.0, 5.0]])
    present = jnp.array([[True, True, False], [True, False, False], [False, False, False]])
    values, some = example_divergence(means, present)
    np.testing.assert_array_equal(values, [2.0, 2.0, 0.0])
    assert some.tolist() == [True, True, False]


def keys(seed: int, rows: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), rows)


def as_sets(sampled: Any) -> list[set[int]]:
    return [set(row[row >= 0].tolist()) for row in np.asarray(sampled)]


def test_sampled_queries_are_real_and_differ() -> None:
    segments = jnp.array([[1] * 9 + [0], [1, 1, 2, 0, 0, 0, 0, 0, 0, 0], [0] * 10])
    found = sample_queries(keys(0, 3), segments, 4)
    assert found.shape == (3, 4)
    first, second, third = as_sets(found)
    assert len(first) == 4
    assert first <= set(range(9))
    assert second == {0, 1, 2}
    assert third == set()
    assert np.all(np.diff(found[0]) > 0)
    assert found[1].tolist() == [0, 1, 2, -1]
    seen = {tuple(sample_queries(keys(seed, 3), segments, 4)[0].tolist()) for seed in range(5)}
    assert len(seen) > 1


def test_a_rows_queries_know_nothing_of_other_rows_and_of_padding() -> None:
    segments = (jnp.arange(12) < jnp.array([[12], [5], [9]])).astype(jnp.int32)
    together = sample_queries(keys(2, 3), segments, 4)
    backwards = sample_queries(keys(2, 3)[::-1], segments[::-1], 4)[::-1]
    np.testing.assert_array_equal(together, backwards)
    alone = sample_queries(keys(2, 3)[2:], segments[2:, :9], 4)
    np.testing.assert_array_equal(together[2:], alone)


def test_all_queries_and_more_than_there_are() -> None:
    segments = jnp.array([[1, 1, 1, 0]])
    assert sample_queries(keys(0, 1), segments, 0).tolist() == [[0, 1, 2, -1]]
    assert sample_queries(keys(0, 1), segments, 6).tolist() == [[0, 1, 2, -1, -1, -1]]


def test_queries_are_drawn_evenly() -> None:
    segments = jnp.ones((2000, 5), jnp.int32)
    counts = np.bincount(np.asarray(sample_queries(keys(1, 2000), segments, 2)).ravel(), minlength=5)
    np.testing.assert_allclose(counts / 2000, 0.4, atol=0.05)


def test_top_scores_are_log_probabilities() -> None:
    found = top_scores(jnp.log(jnp.array([0.1, 0.6, 0.3])), 2)
    assert isinstance(found, TopScores)
    assert found.ids.tolist() == [1, 2]
    np.testing.assert_allclose(np.exp(found.values), [0.6, 0.3], rtol=1e-5)
