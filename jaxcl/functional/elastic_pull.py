r"""Decoupled elastic pull: params go back towards an anchor by their importance, however the optimizer moves them.

Elastic weight consolidation adds $\frac{\lambda}{2} \sum_p F_p (\theta_p - a_p)^2$ to the loss. Its gradient then goes
through clipping and into the moments of Adam, and at a high strength the step overshoots. Here the penalty is taken
out of the gradient, as AdamW takes out weight decay (Loshchilov & Hutter, 2019, arXiv 1711.05101), and is minimised
exactly after the optimizer's step, in the optimizer's own measure of length (a proximal step):

$$\theta \leftarrow \theta' + \frac{s F}{1 + s F} (a - \theta'), \qquad s = \lambda \cdot \eta \cdot p,$$

with the params $\theta'$ after the step, the learning rate $\eta$ and the preconditioner's scale $p$: the step that the
optimizer makes of a gradient of 1. The result lies between $\theta'$ and the anchor at any strength. Where the
gradient $g$ of the new domain does not change, params come to rest at the distance $g / (\lambda F)$, whatever
optimizer, learning rate and number of steps are: that of the penalised loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxcl.functional.row_column import Sides
from jaxcl.functional.soft_masks import soft_mask

_MEMORY = 0.99  # of the mean squares that a preconditioner's scale is estimated from


class PullState(NamedTuple):
    """State of `elastic_optimizer`.

    Attributes:
      direction: state of the parts that make a direction of the gradient.
      step: state of the parts that make a step of it.
      gradient: running mean squares of the gradient, before clipping, of each param or each layer of it.
      update: running mean squares of the direction, likewise.
    """

    direction: PyTree
    step: PyTree
    gradient: PyTree
    update: PyTree


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

    The preconditioner's scale is estimated for each layer of each param: the root of the mean square of what the
    optimizer makes of gradients, divided by that of the gradients, both with a memory of about 100 steps. It is
    1 for plain gradient descent.

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
        zeros = jax.tree.map(lambda leaf, side: jnp.sum(jnp.zeros_like(leaf), _own(side), keepdims=True), params, sides)
        return PullState(first.init(params), second.init(params), zeros, zeros)

    def update(gradient: PyTree, state: PullState, params: PyTree, *, learning_rate: Any, **extra: Any) -> Any:
        extra = {**extra, "learning_rate": learning_rate}
        direction, first_state = first.update(gradient, state.direction, params, **extra)
        updates, second_state = second.update(direction, state.step, params, **extra)
        if not pull:
            return updates, PullState(first_state, second_state, state.gradient, state.update)
        with jax.named_scope("pull"):
            squares = [
                jax.tree.map(
                    lambda mean, leaf, side: (
                        _MEMORY * mean + (1 - _MEMORY) * jnp.mean(jnp.square(leaf), _own(side), keepdims=True)
                    ),
                    means,
                    leaves,
                    sides,
                )
                for means, leaves in ((state.gradient, gradient), (state.update, direction))
            ]
            rates = jax.tree.map(
                lambda stiff, of, made: stiff * learning_rate * _scale(of, made), extra["stiffness"], *squares
            )
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


def _own(side: Sides) -> tuple[int, ...]:
    """The axes of one layer's param."""
    return (*side.inputs, *side.outputs)


def _scale(gradient: Float[Array, "..."], update: Float[Array, "..."]) -> Float[Array, "..."]:
    """The step made of a gradient of 1; 0 where there was no gradient yet."""
    return jnp.sqrt(update / jnp.where(gradient == 0, 1.0, gradient)) * (gradient > 0)
