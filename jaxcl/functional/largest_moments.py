r"""Steps of those params only whose gradients have pointed one way for longest: the largest entries of the moment."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from jaxcl.functional.row_column import Sides


def moment_of(state: PyTree) -> PyTree | None:
    """The first moment in the state of an optimizer; `None` if it has none."""
    found = optax.tree_utils.tree_get(state, "mu")
    return optax.tree_utils.tree_get(state, "trace") if found is None else found


def largest_entries(values: Float[Array, "..."], axes: tuple[int, ...], share: float) -> Bool[Array, "..."]:
    """Which entries are the largest in magnitude, along some axes; more than the share where several are equal.

    The smallest of them is found bit by bit, by counting how many are at least as large: nothing is sorted, and on
    several devices only counts are sent.

    Args:
      values: any.
      axes: the axes to compare along; every place of the others is by itself.
      share: of the entries, above 0; at least one entry.

    Examples:
      >>> largest_entries(jnp.array([[1.0, -3.0, 2.0, 0.5]]), (1,), 0.5).tolist()
      [[False, True, True, False]]
    """
    # Floats that are not negative are in the order of their bits.
    bits = jax.lax.bitcast_convert_type(jnp.abs(values.astype(jnp.float32)), jnp.int32)
    count = max(1, round(share * math.prod(values.shape[axis] for axis in axes)))

    def narrow(place: Array, threshold: Array) -> Array:
        higher = threshold | (1 << (30 - place))
        enough = jnp.sum(bits >= higher, axis=axes, keepdims=True) >= count
        return jnp.where(enough, higher, threshold)

    start = jnp.zeros([1 if axis in axes else length for axis, length in enumerate(values.shape)], jnp.int32)
    return bits >= jax.lax.fori_loop(0, 31, narrow, start)


def largest_moments(
    *,
    clip: optax.GradientTransformation,
    precondition: optax.GradientTransformation,
    weight_decay: optax.GradientTransformation,
    learning_rate: optax.GradientTransformation,
    sides: PyTree,
    share: float,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that moves only the entries of each layer's param whose first moment is largest.

    Weight decay moves no others either.

    Args:
      clip: clips the gradient.
      precondition: has a first moment, such as Adam's, see `moment_of`.
      weight_decay: adds the decay.
      learning_rate: scales and negates.
      sides: a tree like the params with `Sides` as leaves.
      share: of the entries of a param, that move.
    """
    first = optax.with_extra_args_support(optax.chain(clip, precondition))
    second = optax.with_extra_args_support(optax.chain(weight_decay, learning_rate))

    def init(params: PyTree) -> tuple[PyTree, PyTree]:
        return first.init(params), second.init(params)

    def update(gradient: PyTree, state: PyTree, params: PyTree, **extra: Any) -> Any:
        direction, first_state = first.update(gradient, state[0], params, **extra)
        updates, second_state = second.update(direction, state[1], params, **extra)
        with jax.named_scope("largest_moments"):
            updates = jax.tree.map(
                lambda leaf, moment, side: leaf * _chosen(moment, side, share), updates, moment_of(first_state), sides
            )
        return updates, (first_state, second_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _chosen(moment: Array, side: Sides, share: float) -> Array:
    return largest_entries(moment, (*side.inputs, *side.outputs), share)
