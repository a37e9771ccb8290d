"""Diagonal Fisher information of single examples, and the penalty made of it (Kirkpatrick et al., 2017)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree


class FisherSums(NamedTuple):
    """A running mean over examples.

    Attributes:
      total: sums of squared gradients, the params' tree, float32.
      examples: how many examples were added.
    """

    total: PyTree
    examples: Float[Array, ""]

    @classmethod
    def zero(cls, params: PyTree) -> FisherSums:
        """No example yet."""
        return cls(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params), jnp.float32(0))

    def add(self, squares: PyTree, examples: Float[Array, ""]) -> FisherSums:
        """The sums with a batch's summed squares and its number of examples added."""
        return FisherSums(jax.tree.map(jnp.add, self.total, squares), self.examples + examples)

    def mean(self) -> PyTree:
        """The diagonal Fisher information; 0 where there was no example."""
        return jax.tree.map(lambda total: total / jnp.maximum(self.examples, 1.0), self.total)


def summed_squares(loss: Callable[[PyTree, Any], Float[Array, ""]], params: PyTree, rows: PyTree) -> PyTree:
    """Sum over examples of the squared gradient of each example's loss, float32.

    Args:
      loss: of params and one example.
      params: where the gradient is taken.
      rows: the examples, leaves with a leading batch axis. All their gradients exist at the same time.

    Examples:
      >>> summed_squares(lambda w, x: w * x, jnp.float32(1.0), jnp.array([1.0, 2.0])).item()
      5.0
    """
    gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, rows)
    return jax.tree.map(lambda leaf: jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=0), gradients)


def drawn_tokens(logits: Float[Array, "... vocab"], places: Float[Array, "..."]) -> Int[Array, "..."]:
    """A token for each position, drawn from the softmax of its scores.

    Args:
      logits: scores.
      places: uniform draws in [0, 1): where the token lies when all probabilities are laid one after the other.

    Examples:
      >>> drawn_tokens(jnp.log(jnp.array([0.25, 0.5, 0.25])), jnp.array(0.6)).item()
      1
    """
    below = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
    search = jnp.vectorize(lambda row, place: jnp.searchsorted(row, place, side="right"), signature="(v),()->()")
    # Rounding may put a place at the very end, behind all tokens.
    return jnp.minimum(search(below, places * below[..., -1]), logits.shape[-1] - 1).astype(jnp.int32)


def quadratic_penalty(params: PyTree, anchor: PyTree, fisher: PyTree) -> Float[Array, ""]:
    """`sum of fisher * (params - anchor)^2` over all params, in float32.

    >>> quadratic_penalty(jnp.array([1.0, 2.0]), jnp.array([0.0, 0.0]), jnp.array([3.0, 0.5])).item()
    5.0
    """

    def penalty(param: Array, anchor: Array, fisher: Array) -> Array:
        return jnp.sum(fisher * jnp.square(param.astype(jnp.float32) - anchor.astype(jnp.float32)))

    return sum(jax.tree.leaves(jax.tree.map(penalty, params, anchor, fisher)), jnp.float32(0))
