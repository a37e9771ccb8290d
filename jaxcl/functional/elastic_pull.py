r"""Decoupled elastic pull: params go back towards an anchor by their importance, however the optimizer moves them.

Elastic weight consolidation adds $\frac{\lambda}{2} \sum_p F_p (\theta_p - a_p)^2$ to the loss. Its gradient then goes
through clipping and into the moments of Adam, and at a high strength the step overshoots. Here the penalty is taken
out of the gradient, as AdamW takes out weight decay (Loshchilov & Hutter, 2019, arXiv 1711.05101), and is minimised
exactly after the optimizer's step, in the optimizer's own measure of length (a proximal step):

$$\theta \leftarrow \theta' + \frac{s F}{1 + s F} (a - \theta'), \qquad s = \lambda \cdot \eta \cdot p,$$

with the params $\theta'$ after the step, the learning rate $\eta$ and the preconditioner's scale $p$ of each param: the
step that the optimizer makes of a gradient of 1. The result lies between $\theta'$ and the anchor at any strength.
Where the gradient $g$ of the new domain does not change, params come to rest at the distance $g / (\lambda F)$,
whatever optimizer, learning rate and number of steps are: that of the penalised loss.

Adam moves params of small gradients as far as others, so their scale is large, and with it the pull. With one scale for
a whole matrix, what the new domain hardly needs would drift: its importance is small, too. The scale is estimated like
the importance, by rows and columns (`RowColumn`) of the mean squares $G$ of gradients and $D$ of what the optimizer
makes of them,

$$p = \sqrt{\hat D / \hat G}.$$
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxcl.functional.row_column import RowColumn, Sides
from jaxcl.functional.soft_masks import soft_mask

_MEMORY = 0.99  # of the mean squares that a preconditioner's scale is estimated from


class PullState(NamedTuple):
    """State of `elastic_optimizer`.

    Attributes:
      direction: state of the parts that make a direction of the gradient.
      step: state of the parts that make a step of it.
      gradient: running mean squares of the gradient, before clipping.
      update: running mean squares of the direction.
    """

    direction: PyTree
    step: PyTree
    gradient: RowColumn
    update: RowColumn


def elastic_optimizer(
    *,
    clip: optax.GradientTransformation,
    precondition: optax.GradientTransformation,
    weight_decay: optax.GradientTransformation,
    learning_rate: optax.GradientTransformation,
    sides: PyTree,
    mask: bool = False,
    pull: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer with soft masks on its steps, with an elastic pull after them, or with both.

    Its `update` needs params and the keyword arguments `learning_rate`, `masks` (with `mask`), and with `pull`
    `anchor` and `stiffness`: strength times importance. All are trees like the params; masks and stiffness may have
    any shape that broadcasts.

    The preconditioner's scale is estimated from mean squares with a memory of about 100 steps, see
    `preconditioner_scale`. It is 1 for plain gradient descent.

    Args:
      clip: clips the gradient.
      precondition: Adam's, for example.
      weight_decay: adds the decay.
      learning_rate: scales and negates.
      sides: a tree like the params with `Sides` as leaves.
      mask: whether there are soft masks.
      pull: whether there is a pull.
    """
    first = optax.with_extra_args_support(optax.chain(clip, precondition))
    masks = [soft_mask()] if mask else []
    second = optax.with_extra_args_support(optax.chain(weight_decay, *masks, learning_rate))

    def init(params: PyTree) -> PullState:
        zero = RowColumn.zero(params, sides)
        return PullState(first.init(params), second.init(params), zero, zero)

    def update(gradient: PyTree, state: PullState, params: PyTree, *, learning_rate: Any, **extra: Any) -> Any:
        extra = {**extra, "learning_rate": learning_rate}
        direction, first_state = first.update(gradient, state.direction, params, **extra)
        updates, second_state = second.update(direction, state.step, params, **extra)
        if not pull:
            return updates, PullState(first_state, second_state, state.gradient, state.update)
        with jax.named_scope("pull"):
            squares = _running(state.gradient, gradient, sides), _running(state.update, direction, sides)
            scale = preconditioner_scale(*squares, sides)
            rates = jax.tree.map(lambda stiff, one: stiff * learning_rate * one, extra["stiffness"], scale)
            updates = pulled(updates, params, extra["anchor"], rates)
        return updates, PullState(first_state, second_state, *squares)

    return optax.GradientTransformationExtraArgs(init, update)


def pulled(updates: PyTree, params: PyTree, anchor: PyTree, rates: PyTree) -> PyTree:
    """The updates, followed by the minimum of `rate / 2 (x - anchor)^2 + 1 / 2 (x - params)^2`.

    A rate of 0 changes no bit of an update. Compiled together with what adds it to the params, the sum may be rounded
    otherwise than without a pull.

    Args:
      updates: what is added to the params.
      params: before the update.
      anchor: where params are pulled to, any float dtype.
      rates: at least 0; 1 halves the distance.

    Examples:
      >>> pulled(jnp.array([1.0]), jnp.array([2.0]), jnp.array([1.0]), jnp.array([1.0])).tolist()  # from 3 to 2
      [0.0]
    """

    def pull(update: Array, param: Array, anchor: Array, rate: Array) -> Array:
        back = (anchor.astype(update.dtype) - (param + update)) / (1.0 + 1.0 / rate)
        return jnp.where(rate == 0, update, update + back)

    return jax.tree.map(pull, updates, params, anchor, rates)


def preconditioner_scale(gradient: RowColumn, update: RowColumn, sides: PyTree) -> PyTree:
    """The step made of a gradient of 1, for every param.

    A row or column that had no gradient yet counts like the mean of its matrix; 0 where the whole matrix had none.

    Args:
      gradient: mean squares of gradients.
      update: mean squares of what was made of them.
      sides: a tree like the params with `Sides` as leaves.

    Examples:
      >>> ones = RowColumn(jnp.ones((2, 1)), jnp.ones((1, 2)))
      >>> preconditioner_scale(ones.scaled(4.0), ones, Sides((0,), (1,))).tolist()
      [[0.5, 0.5], [0.5, 0.5]]
    """

    def scale(rows: Array, columns: Array, made_rows: Array, made_columns: Array, side: Sides) -> Array:
        # Sums of rows and of columns are equal, and are what a product of the two is divided by.
        totals = (jnp.sum(one, axis=side.inputs, keepdims=True) for one in (made_rows, rows))
        mean = _root(*totals, otherwise=0.0)
        by_row = _root(made_rows, rows, otherwise=mean)
        if not side.outputs:
            return by_row
        by_column = _root(made_columns, columns, otherwise=mean)
        return by_row * (by_column / jnp.where(mean > 0, mean, 1.0))

    return jax.tree.map(scale, gradient.inputs, gradient.outputs, update.inputs, update.outputs, sides)


def _root(made: Array, of: Array, *, otherwise: Array | float) -> Array:
    return jnp.where(of > 0, jnp.sqrt(made / jnp.where(of > 0, of, 1.0)), otherwise)


def _running(mean: RowColumn, values: PyTree, sides: PyTree) -> RowColumn:
    """Running mean squares of values, with some more."""
    new = RowColumn.of(jax.tree.map(jnp.square, values), sides)
    return jax.tree.map(lambda before, now: _MEMORY * before + (1 - _MEMORY) * now, mean, new)
