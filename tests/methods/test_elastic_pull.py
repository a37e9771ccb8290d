"""The elastic pull against its formula, at any strength, with any optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcl.functional.elastic_pull import elastic_optimizer, pulled
from jaxcl.functional.row_column import Sides

SIDES = {"kernel": Sides((1,), (2,)), "scale": Sides((0,), ())}
RANDOM = np.random.default_rng(0)


def draw() -> dict[str, Any]:
    return {
        "kernel": jnp.asarray(RANDOM.normal(size=(2, 3, 4)), jnp.float32),
        "scale": jnp.asarray(RANDOM.normal(size=5)),
    }


def optimizer(precondition: Any, clip: Any = None, decay: Any = None, **options: Any) -> Any:
    rate = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None, *, learning_rate, **_: (
            jax.tree.map(lambda leaf: -learning_rate * leaf, updates),
            state,
        ),
    )
    parts = {"clip": clip or optax.identity(), "weight_decay": decay or optax.identity()}
    return elastic_optimizer(**parts, precondition=precondition, learning_rate=rate, sides=SIDES, **options)


def test_the_pull_minimises_the_penalty_and_the_distance_to_the_step() -> None:
    updates, params, anchor = draw(), draw(), draw()
    rates = jax.tree.map(jnp.square, draw())
    found = jax.tree.map(jnp.add, params, pulled(updates, params, anchor, rates))
    for name in params:
        after, rate = np.asarray(params[name] + updates[name], np.float64), np.asarray(rates[name], np.float64)
        want = (after + rate * anchor[name]) / (1 + rate)
        np.testing.assert_allclose(found[name], want, rtol=1e-5, atol=1e-6)


def test_it_is_stable_at_any_strength() -> None:
    updates, params, anchor = draw(), draw(), draw()
    for rate, want in ((jnp.inf, anchor), (1e30, anchor), (1e-30, jax.tree.map(jnp.add, params, updates))):
        rates = jax.tree.map(lambda leaf, rate=rate: jnp.full_like(leaf, rate), params)
        found = jax.tree.map(jnp.add, params, pulled(updates, params, anchor, rates))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, want)
    zero = pulled(updates, params, anchor, jax.tree.map(jnp.zeros_like, params))
    jax.tree.map(np.testing.assert_array_equal, zero, updates)


def test_the_scale_is_what_the_preconditioner_makes_of_a_gradient_of_1() -> None:
    """Gradient descent by hand, with a preconditioner that differs by layer, by row and column, and by param.

    Gradients are as large as a product of rows and columns, so that the estimate is exact.
    """
    layers, rows, columns = jnp.array([3.0, 0.5]), jnp.array([1.0, 0.1, 10.0]), jnp.array([1.0, 2.0, 3.0, 40.0])
    factors = {
        "kernel": layers[:, None, None] * rows[:, None] * columns,
        "scale": jnp.array([0.5, 1.0, 2.0, 7.0, 0.01]),
    }

    def gradients() -> dict[str, Any]:
        sizes = {"kernel": jnp.array([5.0, 1.0, 0.2])[:, None] * jnp.array([1.0, 3.0, 0.5, 2.0]), "scale": 2.0}
        return {name: jnp.sign(leaf) * sizes[name] for name, leaf in draw().items()}

    precondition = optax.stateless(lambda updates, params: jax.tree.map(lambda x, f: x * f, updates, factors))
    # Clipping changes the step, and with it the scale, but not how far a gradient of 1 would be from rest.
    transform = optimizer(precondition, clip=optax.scale(0.1))
    params, anchor = draw(), draw()
    stiffness = jax.tree.map(jnp.square, draw())
    state = transform.init(params)
    for rate in (0.1, 0.02):
        gradient = gradients()
        updates, state = transform.update(
            gradient, state, params, learning_rate=rate, anchor=anchor, stiffness=stiffness
        )
        for name, factor in factors.items():
            after = np.asarray(params[name] - rate * 0.1 * factor * gradient[name], np.float64)
            s = rate * 0.1 * np.asarray(factor * stiffness[name], np.float64)
            want = after + s / (1 + s) * (anchor[name] - after) - params[name]
            np.testing.assert_allclose(updates[name], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam", "lion", "momentum"])
@pytest.mark.parametrize("clip", [None, 5.0])
def test_params_come_to_rest_near_where_the_penalised_loss_has_its_minimum(name: str, clip: float | None) -> None:
    """A constant gradient against a pull: at rest, it is the stiffness times the distance, but for moments' factors.

    Adam and Lion make steps of one size: their scale is 1 / gradient, and they come to rest at the same place.
    """
    make = {"sgd": optax.identity, "adam": optax.scale_by_adam, "lion": optax.scale_by_lion}
    precondition = optax.trace(0.9) if name == "momentum" else make[name]()
    transform = optimizer(precondition, clip=None if clip is None else optax.clip_by_global_norm(clip))
    rows, columns = jnp.array([2.0, 0.2, -0.5]), jnp.array([1.0, 0.5, 4.0, -1.0])
    gradient = {"kernel": jnp.stack([rows[:, None] * columns] * 2), "scale": jnp.array([-0.5, 3.0, 1.0, 0.2, 0.1])}
    anchor = draw()
    # So stiff where the gradient is large that the way to the place of rest is not longer than Adam's steps.
    stiffness = jax.tree.map(lambda leaf: 2.0 * jnp.abs(leaf), gradient)

    @jax.jit
    def step(carry: Any, rate: Any) -> Any:
        params, state = carry
        updates, state = transform.update(
            gradient, state, params, learning_rate=rate, anchor=anchor, stiffness=stiffness
        )
        return (optax.apply_updates(params, updates), state), None

    rates = jnp.linspace(0.3, 0.0, 800, endpoint=False)
    (params, _), _ = jax.lax.scan(step, (anchor, transform.init(anchor)), rates)
    for leaf, slope in gradient.items():
        np.testing.assert_allclose(params[leaf] - anchor[leaf], -slope / stiffness[leaf], rtol=0.05, err_msg=leaf)


def test_masks_come_before_the_pull_and_decay_is_masked() -> None:
    transform = optimizer(optax.identity(), decay=optax.add_decayed_weights(0.5), mask=True)
    params, gradient, anchor = draw(), draw(), draw()
    masks = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.25), params)
    extra = {"learning_rate": 0.1, "anchor": anchor, "masks": masks}
    for stiffness in (0.0, jnp.inf):
        stiff = jax.tree.map(lambda leaf, one=stiffness: jnp.full_like(leaf, one), params)
        updates, _ = transform.update(gradient, transform.init(params), params, stiffness=stiff, **extra)
        for name in params:
            step = -0.1 * 0.25 * (gradient[name] + 0.5 * params[name])
            want = step if stiffness == 0 else anchor[name] - params[name]
            np.testing.assert_allclose(updates[name], want, rtol=1e-5, atol=1e-6)


def test_where_there_was_no_gradient_there_is_no_pull() -> None:
    transform = optimizer(optax.scale_by_adam())
    params, anchor = draw(), draw()
    none = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(
        none,
        transform.init(params),
        params,
        learning_rate=0.1,
        anchor=anchor,
        stiffness=jax.tree.map(jnp.ones_like, params),
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))


def test_rows_without_a_gradient_are_held_like_the_mean_of_their_matrix() -> None:
    """Embeddings of tokens that do not occur: weight decay moves them, and the pull brings them back."""
    transform = optimizer(optax.identity(), clip=optax.scale(3.0), decay=optax.add_decayed_weights(0.5))
    params, anchor, gradient = draw(), draw(), draw()
    gradient["kernel"] = gradient["kernel"].at[:, 1].set(0.0)
    gradient["scale"] = gradient["scale"].at[2].set(0.0)
    stiffness = jax.tree.map(lambda leaf: jnp.full_like(leaf, 2.0), params)
    updates, _ = transform.update(
        gradient, transform.init(params), params, learning_rate=0.1, anchor=anchor, stiffness=stiffness
    )
    for name, leaf in params.items():
        after = np.asarray(leaf - 0.1 * (3.0 * gradient[name] + 0.5 * leaf), np.float64)
        s = 0.1 * 3.0 * 2.0
        want = after + s / (1 + s) * (anchor[name] - after) - leaf
        np.testing.assert_allclose(updates[name], want, rtol=1e-4, atol=1e-6, err_msg=name)
