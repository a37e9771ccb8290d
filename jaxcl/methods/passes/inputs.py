"""What the matrices of the layers read: mean squares of their inputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxcl.functional.losses import over_positions, scored_states, token_losses
from jaxcl.functional.row_column import Sides
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network, Params
from jaxcl.models.product import input_squares
from jaxcl.models.trainable import overlay, trained


def matrix_sides(network: Network) -> PyTree:
    """The params' tree with the `Sides` of every matrix of a layer, and `None` for other params.

    Args:
      network: the network.
    """

    def keep(side: Sides, unit: Any) -> Sides | None:
        return None if unit is None or not side.outputs else side

    return jax.tree.map(keep, network.sides(), network.units(), is_leaf=lambda node: isinstance(node, Sides))


@jax.named_scope("importance")
def summed_input_squares(network: Network, params: Params, batch: Batch, chunk: int) -> PyTree:
    """Sums of squared inputs of every matrix of a layer, over the tokens of a batch that are not padding.

    One forward and backward pass, see `jaxcl.models.product.input_squares`. No dropout is used.

    Args:
      network: without adapters and experts.
      params: its params.
      batch: token rows.
      chunk: see `over_positions`; static.

    Returns:
      A tree like the params, float32; output axes have size 1, what is not a matrix of a layer is `None`.
    """

    def loss(part: Params) -> Array:
        whole = overlay(params, part)
        with input_squares(batch.segments != 0):
            states = network.hidden(whole, batch).states

        def losses(inputs: tuple[Array, Array]) -> Array:
            return token_losses(network.logits(whole, inputs[0]), inputs[1])

        scored = scored_states(states, batch.predict), batch.targets
        return jnp.sum(over_positions(losses, scored, chunk) * batch.weights)

    def first(leaf: Array, side: Sides | None) -> Array | None:
        if side is None:
            return None
        for axis in side.outputs:
            leaf = jax.lax.slice_in_dim(leaf, 0, 1, axis=axis)
        return leaf.astype(jnp.float32)

    return jax.tree.map(first, jax.grad(loss)(trained(params)), matrix_sides(network))
