r"""Importance of units: per-example gradients of virtual gates (DAS, section 3.1).

A gate is a factor of 1 on a unit's output. It is never trained, only differentiated:
$I = \frac{1}{N} \sum_n |\partial L(x_n) / \partial g|$ at $g = 1$. Each example has its own copy of the gates, so one
backward pass over a batch gives all per-example gradients. Give $L(x_n)$ as the example's own mean loss: how examples
are put into batches then changes nothing.

The authors' code sums gradients over examples before it takes absolute values, standardises by the deviation of a
sample (n - 1) and has the gate of intermediate units before their activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

Normalisation = Literal["tanh", "quantile"]


class ImportanceSums(NamedTuple):
    """A running mean over examples.

    Attributes:
      total: sums of absolute gate gradients, leaves `[layers, units]`.
      examples: how many examples were added.
    """

    total: PyTree
    examples: Float[Array, ""]

    @classmethod
    def zero(cls, gates: PyTree) -> ImportanceSums:
        """No example yet.

        Args:
          gates: a tree with the shapes of the sums, leaves `[layers, units]`.
        """
        return cls(jax.tree.map(jnp.zeros_like, gates), jnp.float32(0))

    def add(self, gradients: PyTree, real: Float[Array, " batch"] | Bool[Array, " batch"]) -> ImportanceSums:
        """The sums with a batch added.

        Args:
          gradients: per-example gate gradients, leaves `[layers, batch, units]`; see `gate_gradients`.
          real: 1 for examples that count, 0 for rows that only fill the batch.
        """
        real = real.astype(jnp.float32)
        total = jax.tree.map(
            lambda before, gradient: before + jnp.einsum("lbu,b->lu", jnp.abs(gradient), real), self.total, gradients
        )
        return ImportanceSums(total, self.examples + jnp.sum(real))

    def mean(self) -> PyTree:
        """Importance before normalisation; 0 where there was no example."""
        return jax.tree.map(lambda total: total / jnp.maximum(self.examples, 1.0), self.total)


def gate_gradients(losses: Callable[[PyTree], Float[Array, " batch"]], gates: PyTree) -> PyTree:
    """Gradient of each example's loss with respect to its own gates, in one backward pass.

    Args:
      losses: from gates to one loss per example; examples do not influence each other.
      gates: where to take the gradient, leaves `[layers, batch, units]`: ones.

    Returns:
      Gradients in the tree of `gates`.

    Examples:
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])  # two examples, two units of one layer
      >>> gate_gradients(lambda gates: jnp.sum(gates["units"][0] * x, axis=1) ** 2, {"units": jnp.ones((1, 2, 2))})
      {'units': Array([[[ 6., 12.],
              [42., 56.]]], dtype=float32)}
    """
    return jax.grad(lambda gates: jnp.sum(losses(gates)))(gates)


@jax.named_scope("importance")
def normalise(importance: PyTree, how: Normalisation, share: float) -> PyTree:
    """Importance to [0, 1], for each layer and each kind of unit by itself.

    Args:
      importance: leaves `[layers, units]`.
      how: `tanh`: standardise, tanh, absolute value (DAS, equation 3); units far *below* the mean are protected as
        well. `quantile`: units are ranked, the lowest `1 - share` get 0 and the rest rises evenly to 1.
      share: the share of units that `quantile` protects at all.
    """
    normalise_layers = normalise_tanh if how == "tanh" else lambda x: normalise_quantile(x, share)
    return jax.tree.map(normalise_layers, importance)


def normalise_tanh(scores: Float[Array, "layers units"]) -> Float[Array, "layers units"]:
    """`|tanh((x - mean) / deviation)|` per layer; 0 in a layer whose scores are all equal.

    The deviation is that of the population (divided by n).

    Examples:
      >>> [f"{x:.4f}" for x in normalise_tanh(jnp.array([[1.0, 3.0]]))[0]]  # standardised: -1 and 1
      ['0.7616', '0.7616']
    """
    # Equal scores give exactly 0: the mean of what is left of them after their first is not rounded.
    shifted = scores - scores[..., :1]
    centred = shifted - jnp.mean(shifted, axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True))
    return jnp.abs(jnp.tanh(centred / jnp.where(deviation == 0, 1.0, deviation)))


def normalise_quantile(scores: Float[Array, "layers units"], share: float) -> Float[Array, "layers units"]:
    """`max(0, (u - (1 - share)) / share)` with the rank `u` in (0, 1) that a unit's `scores` have in its layer.

    The rank of a unit is the share of units below it; units equal to it count half. Where all scores are 0, as those of
    a tower that saw no image, so is what comes out.

    Examples:
      >>> normalise_quantile(jnp.array([[0.1, 0.4, 0.3, 0.2]]), share=0.5).tolist()
      [[0.0, 0.75, 0.25, 0.0]]
    """

    def ranks(layer: Array) -> Array:
        ordered = jnp.sort(layer)
        below = jnp.searchsorted(ordered, layer, side="left")
        through = jnp.searchsorted(ordered, layer, side="right")
        return (below + through) / (2 * layer.size)

    found = jnp.maximum(0.0, (jax.vmap(ranks)(scores) - (1.0 - share)) / share)
    return jnp.where(jnp.any(scores > 0, axis=-1, keepdims=True), found, 0.0)


def accumulate(before: PyTree, now: PyTree) -> PyTree:
    """What all domains so far need: the element-wise maximum of `before` and `now` (DAS, equation 4)."""
    return jax.tree.map(jnp.maximum, before, now)
