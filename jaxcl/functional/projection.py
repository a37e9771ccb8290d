r"""Updates without what would harm what is known: a direction in which a loss rises, or a subspace of a matrix."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxcl.functional.row_column import Sides


class Directions(NamedTuple):
    """Orthonormal directions of a matrix, or of several along leading axes.

    Attributes:
      inputs: of its input side.
      outputs: of its output side.
    """

    inputs: Float[Array, "... inputs directions"]
    outputs: Float[Array, "... outputs directions"]


def without_conflict(gradient: PyTree, reference: PyTree) -> PyTree:
    r"""The gradient, projected so that a step along it does not raise the loss of the reference, to first order.

    $g - \frac{g^\top r}{r^\top r}\, r$ where $g^\top r < 0$, and $g$ itself elsewhere (Chaudhry et al., 2019,
    arXiv 1812.00420, equation 11).

    Args:
      gradient: g.
      reference: r, a tree of the same structure and shapes.

    Examples:
      >>> without_conflict(jnp.array([1.0, -2.0]), jnp.array([0.0, 3.0])).tolist()
      [1.0, 0.0]
      >>> without_conflict(jnp.array([1.0, 2.0]), jnp.array([0.0, 3.0])).tolist()
      [1.0, 2.0]
    """

    def product(one: PyTree, other: PyTree) -> Array:
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, one, other)), jnp.float32(0))

    along, length = product(gradient, reference), product(reference, reference)
    factor = jnp.where(along < 0, along / jnp.where(length == 0, 1.0, length), 0.0)
    return jax.tree.map(lambda own, other: own - factor * other, gradient, reference)


def leading_directions(weights: Float[Array, "..."], side: Sides, count: int) -> Directions:
    """The singular directions of a matrix with the largest singular values.

    Args:
      weights: a matrix, or several along axes that are in neither side.
      side: which axes are its inputs and outputs.
      count: number of directions, at most the smaller side.
    """
    left, _, right = jnp.linalg.svd(_matrices(weights, side), full_matrices=False)
    return Directions(left[..., :count], jnp.swapaxes(right, -1, -2)[..., :count])


def outside(update: Float[Array, "..."], directions: Directions, side: Sides) -> Float[Array, "..."]:
    r"""The part of an update that is orthogonal to directions on both sides, $(I - U U^\top) \Delta W (I - V V^\top)$.

    Args:
      update: of the weights.
      directions: U and V. Those of all zeros leave the update as it is.
      side: see `leading_directions`.
    """
    matrices = _matrices(update, side)
    u, v = directions
    matrices = matrices - u @ (jnp.swapaxes(u, -1, -2) @ matrices)
    matrices = matrices - (matrices @ v) @ jnp.swapaxes(v, -1, -2)
    return _unfolded(matrices, update, side)


def smaller_side(weights: Any, side: Sides) -> int:
    """The number of inputs or outputs of a matrix, whichever is smaller."""
    return min(math.prod(weights.shape[axis] for axis in axes) for axes in side)


def orthogonal_optimizer(inner: optax.GradientTransformation, sides: PyTree) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose steps, weight decay included, are projected by `outside`.

    Its `update` needs the keyword argument `directions`: a tree like the params, with `Directions`, or `None` for a
    param that moves freely.

    Args:
      inner: makes the steps.
      sides: a tree like the params with `Sides` as leaves.
    """
    inner = optax.with_extra_args_support(inner)

    def update(gradient: PyTree, state: PyTree, params: PyTree, *, directions: PyTree, **extra: Any) -> Any:
        updates, state = inner.update(gradient, state, params, **extra)
        with jax.named_scope("project"):
            updates = jax.tree.map(
                lambda leaf, side, held: leaf if held is None else outside(leaf, held, side), updates, sides, directions
            )
        return updates, state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _order(leaf: Any, side: Sides) -> tuple[int, ...]:
    """The axes of a param: those of neither side, of its inputs, of its outputs."""
    batch = tuple(axis for axis in range(len(leaf.shape)) if axis not in (*side.inputs, *side.outputs))
    return (*batch, *side.inputs, *side.outputs)


def _matrices(leaf: Float[Array, "..."], side: Sides) -> Float[Array, "... inputs outputs"]:
    order = _order(leaf, side)
    moved = jnp.transpose(leaf, order)
    batch = moved.shape[: len(order) - len(side.inputs) - len(side.outputs)]
    inputs = math.prod(leaf.shape[axis] for axis in side.inputs)
    return moved.reshape(*batch, inputs, -1)


def _unfolded(matrices: Float[Array, "..."], like: Float[Array, "..."], side: Sides) -> Float[Array, "..."]:
    order = _order(like, side)
    moved = matrices.reshape([like.shape[axis] for axis in order])
    return jnp.transpose(moved, [order.index(axis) for axis in range(len(order))])
