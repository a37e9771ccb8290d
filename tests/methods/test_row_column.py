"""Importance by rows and columns against NumPy, and against gradients of single matrices taken by brute force."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.functional.row_column import RowColumn, Sides, importance_masks, select, unit_means
from jaxcl.functional.soft_masks import LAYER, Unit

RANDOM = np.random.default_rng(0)
# Two layers; a kernel with inputs of size 4 and outputs of 2 x 3, one the other way round, and a scale.
SIDES = {"query": Sides((1,), (2, 3)), "out": Sides((1, 2), (3,)), "scale": Sides((1,), ()), "embed": Sides((0,), (1,))}
SHAPES = {"query": (2, 4, 2, 3), "out": (2, 2, 3, 4), "scale": (2, 4), "embed": (5, 4)}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
IMPORTANCE = {name: jnp.asarray(RANDOM.gamma(0.5, size=shape), jnp.float32) for name, shape in SHAPES.items()}


def by_hand(importance: dict[str, Any]) -> dict[str, np.ndarray]:
    """`r_i c_j / sum` of every layer's matrix, one layer after the other."""
    found = {}
    for name, side in SIDES.items():
        leaf = np.asarray(importance[name], np.float64)
        layers = leaf[None] if 0 in side.inputs else leaf
        inputs = {"query": 4, "out": 6, "scale": 4, "embed": 5}[name]
        full = []
        for layer in layers:
            matrix = layer.reshape(inputs, -1)
            full.append((np.outer(matrix.sum(1), matrix.sum(0)) / matrix.sum()).reshape(layer.shape))
        found[name] = np.stack(full).reshape(leaf.shape)
    return found


def test_rows_and_columns_are_sums_and_their_product_is_of_rank_one() -> None:
    kept = RowColumn.of(IMPORTANCE, SIDES)
    assert {name: leaf.shape for name, leaf in kept.inputs.items()} == {
        **{"query": (2, 4, 1, 1), "out": (2, 2, 3, 1), "scale": (2, 4), "embed": (5, 1)}
    }
    assert kept.outputs["query"].shape == (2, 1, 2, 3)
    for name, leaf in kept.full(SIDES).items():
        np.testing.assert_allclose(leaf, by_hand(IMPORTANCE)[name], rtol=1e-5, err_msg=name)
    zero = RowColumn.zero(PARAMS, SIDES)
    assert jax.tree.map(jnp.shape, zero) == jax.tree.map(jnp.shape, kept)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(zero.full(SIDES)))
    jax.tree.map(np.testing.assert_array_equal, zero.add(IMPORTANCE, SIDES), kept)
    values = np.concatenate([np.ravel(leaf) for leaf in IMPORTANCE.values()])
    np.testing.assert_allclose(kept.mean(PARAMS), values.mean(), rtol=1e-5)


def test_it_is_the_fisher_information_of_one_layer_with_independent_sides() -> None:
    """Gradients `x d^T` of a matrix; over all pairs of an input and an output gradient, squares factorise."""
    inputs, cotangents = RANDOM.normal(size=(3, 4)), RANDOM.normal(size=(5, 6))
    squares = np.mean([np.outer(x, d) ** 2 for x in inputs for d in cotangents], axis=0)
    side = Sides((0,), (1,))
    np.testing.assert_allclose(RowColumn.of(jnp.asarray(squares), side).full(side), squares, rtol=1e-5)


def test_accumulation_has_no_ceiling_and_releases() -> None:
    one, other = (RowColumn.of(jax.tree.map(lambda x, f=f: f * x, IMPORTANCE), SIDES) for f in (1.0, 3.0))
    total = one.accumulated(other, "sum", 1.0).accumulated(other, "sum", 0.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 5 * b, rtol=1e-5), total, one)
    most = one.accumulated(other, "maximum", 1.0).accumulated(one, "maximum", 0.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 1.5 * b, rtol=1e-5), most, one)
    # A maximum takes rows and columns one by one, so that their sums differ: the product divides by both.
    crossed = RowColumn(jnp.array([[1.0], [3.0]]), jnp.array([[2.0, 7.0]])).full(Sides((0,), (1,)))
    np.testing.assert_allclose(crossed, np.outer([1, 3], [2, 7]) / 6, rtol=1e-5)


@pytest.mark.parametrize("how", ["permuted", "layer"])
def test_controls_keep_what_they_say(how: Any) -> None:
    kept = RowColumn.of(IMPORTANCE, SIDES)
    found = select(kept, SIDES, how, jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, found, select(kept, SIDES, how, jax.random.key(3)))
    full, before = found.full(SIDES), kept.full(SIDES)
    for name, side in SIDES.items():
        own = (*side.inputs, *side.outputs)
        means = np.mean(before[name], axis=own, keepdims=True)
        np.testing.assert_allclose(np.mean(full[name], axis=own, keepdims=True), means, rtol=1e-5)
        if how == "layer":
            np.testing.assert_allclose(full[name], np.broadcast_to(means, full[name].shape), rtol=1e-5)
        if how == "permuted":
            orders = []
            for layer in [0, 1] if 0 not in own else [...]:
                one, other = (np.ravel(tree.inputs[name][layer]) for tree in (kept, found))
                np.testing.assert_array_equal(np.sort(one), np.sort(other))
                orders.append([int(np.flatnonzero(one == value)[0]) for value in other])
            assert any(order != sorted(order) for order in orders), name
            # Heads and their dimensions are permuted together, layers apart from each other.
            assert name != "out" or orders[0] != orders[1]
    assert select(kept, SIDES, "measured", jax.random.key(3)) is kept


@pytest.mark.parametrize("evenness", [0.0, 0.3, 1.0])
def test_evenness_keeps_the_mean(evenness: float) -> None:
    kept = RowColumn.of(IMPORTANCE, SIDES)
    full, found = by_hand(IMPORTANCE), kept.evened(evenness, PARAMS, SIDES)
    mean = np.mean(np.concatenate([np.ravel(leaf) for leaf in full.values()]))
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, (1 - evenness) * full[name] + evenness * mean, rtol=1e-4, err_msg=name)


def test_masks_are_the_formula() -> None:
    kept = RowColumn.of(IMPORTANCE, SIDES)
    full, mean = by_hand(IMPORTANCE), float(kept.mean(PARAMS))
    free = importance_masks(kept.full(SIDES), SIDES, strength=2.0, keep_mean=False)
    even = importance_masks(kept.full(SIDES), SIDES, strength=2.0, keep_mean=True)
    for name, side in SIDES.items():
        want = 1 / (1 + 2 * full[name] / mean)
        np.testing.assert_allclose(free[name], want, rtol=1e-5)
        own = (*side.inputs, *side.outputs)
        np.testing.assert_allclose(even[name], np.minimum(want / want.mean(own, keepdims=True), 4), rtol=1e-5)
    steep = importance_masks(kept.full(SIDES), SIDES, strength=1e6, keep_mean=True)
    assert max(float(jnp.max(leaf)) for leaf in jax.tree.leaves(steep)) == 4
    ones = importance_masks(RowColumn.zero(PARAMS, SIDES).full(SIDES), SIDES, strength=2.0, keep_mean=True)
    assert all(np.all(np.asarray(leaf) == 1) for leaf in jax.tree.leaves(ones))


def test_unit_means_are_over_the_params_of_a_unit() -> None:
    """Four heads, of which pairs share a key's head."""
    query, key, out = (RANDOM.normal(size=shape) for shape in ((2, 3, 4, 2), (2, 3, 2, 2), (2, 4, 2, 3)))
    units = {"q": Unit("heads", 2), "k": Unit("heads", 2), "o": Unit("heads", 1), "n": Unit(LAYER, 0), "e": None}
    values = {"q": query, "k": key, "o": out, "n": np.ones((2, 3)), "e": np.ones((7, 3))}
    found = unit_means(jax.tree.map(jnp.asarray, values), units, {"heads": (2, 4), "output": (2, 3)})
    for layer in range(2):
        for head in range(4):
            parts = query[layer, :, head], key[layer, :, head // 2], out[layer, head]
            want = np.mean(np.concatenate([np.ravel(part) for part in parts]))
            np.testing.assert_allclose(found["heads"][layer, head], want, rtol=1e-5)
    assert not np.any(found["output"])
