import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional.contrastive import contrast, pool


def brute_force(anchor: np.ndarray, positive: np.ndarray, past: np.ndarray, temperature: float) -> float:
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    total = 0.0
    for n in range(len(anchor)):
        own = np.exp(cosine(anchor[n], positive[n]) / temperature)
        below = sum(
            np.exp(cosine(anchor[n], positive[j]) / temperature) + np.exp(cosine(anchor[n], past[j]) / temperature)
            for j in range(len(anchor))
        )
        total -= np.log(own / below)
    return total


@pytest.fixture
def vectors() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(4, 6)).astype(np.float32) for _ in range(3))


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_contrast_equals_brute_force(vectors: tuple[np.ndarray, ...], temperature: float) -> None:
    total, count = contrast(*map(jnp.asarray, vectors), jnp.ones(4, bool), temperature)
    wide = [x.astype(np.float64) for x in vectors]
    np.testing.assert_allclose(total, brute_force(*wide, temperature), rtol=1e-4)
    assert count == 4


def test_contrast_of_a_known_case() -> None:
    # Positive equal to the anchor, past at right angles, one example: log(1 + e^(-1 / temperature)).
    one, other = jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 2.0]])
    total, _ = contrast(one, one * 5, other, jnp.ones(1, bool), 0.5)
    np.testing.assert_allclose(total, np.log1p(np.exp(-2.0)), rtol=1e-5)


def test_filler_rows_are_neither_anchors_nor_negatives(vectors: tuple[np.ndarray, ...]) -> None:
    real = np.array([True, False, True, True])
    kept = contrast(*(jnp.asarray(x[real]) for x in vectors), jnp.ones(3, bool), 0.1)
    found = contrast(*map(jnp.asarray, vectors), jnp.asarray(real), 0.1)
    np.testing.assert_allclose(found, kept, rtol=1e-5)


def test_order_of_examples_does_not_matter(vectors: tuple[np.ndarray, ...]) -> None:
    order = np.array([2, 0, 3, 1])
    one = contrast(*map(jnp.asarray, vectors), jnp.ones(4, bool), 0.1)[0]
    other = contrast(*(jnp.asarray(x[order]) for x in vectors), jnp.ones(4, bool), 0.1)[0]
    np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("real", [[False, False], [True, False]])
def test_gradient_is_finite_with_empty_rows(real: list[bool]) -> None:
    def loss(x: jax.Array) -> jax.Array:
        return contrast(x, x, x, jnp.array(real), 0.05)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.array([[1.0, 2.0], [0.0, 0.0]]))
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    if not any(real):
        assert value == 0


def test_pool_leaves_padding_out() -> None:
    states = jnp.array([[[1.0, 0.0], [3.0, 2.0], [99.0, 99.0]], [[5.0, 5.0], [5.0, 5.0], [5.0, 5.0]]])
    segments = jnp.array([[1, 2, 0], [0, 0, 0]])
    np.testing.assert_array_equal(pool(states, segments), [[2.0, 1.0], [0.0, 0.0]])
    assert pool(states.astype(jnp.bfloat16), segments).dtype == jnp.float32
