"""Fisher information: squared gradients of single examples, or of targets that the model draws itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxcl.functional.fisher import drawn_tokens, summed_squares
from jaxcl.functional.losses import over_positions, scored_states, token_losses
from jaxcl.methods.passes.losses import example_losses
from jaxcl.models.axes import constrain, shards
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network, Params
from jaxcl.models.trainable import overlay, trained


@jax.named_scope("importance")
def add_row_squares(
    network: Network,
    total: PyTree,
    params: Params,
    batch: Batch,
    chunk: int,
    add: Callable[[PyTree, Params], PyTree] | None = None,
    *,
    whole_rows: bool = False,
) -> PyTree:
    """Adds the squared gradients of a batch's single examples, on their true targets.

    One row per device is worked on at a time: a row's gradient is as large as the trained params. No dropout is used;
    rows without a scored position add nothing.

    Args:
      network: the network.
      total: what was added so far.
      params: the network's params.
      batch: token rows.
      chunk: see `over_positions`; static.
      add: adds a tree like the trained params, float32, to `total`; default: leaf by leaf.
      whole_rows: the loss of an example is its sum over its scored positions and not its mean.
    """
    ways = shards("batch")

    def loss(part: Params, row: Batch) -> Array:
        single, whole = jax.tree.map(lambda leaf: leaf[None], row), overlay(params, part)
        states = network.hidden(whole, single).states
        mean = example_losses(network, whole, states, single, chunk)[0]
        return mean * jnp.sum(row.weights) if whole_rows else mean

    def split(leaf: Array) -> Array:
        """Part i holds row i of each device, so that no row moves."""
        parts = leaf.reshape(ways, -1, *leaf.shape[1:]).swapaxes(0, 1)
        return constrain(parts, None, "batch", *[None] * (leaf.ndim - 1))

    def step(total: PyTree, rows: Batch) -> tuple[PyTree, None]:
        squares = summed_squares(loss, trained(params), rows)
        return jax.tree.map(jnp.add, total, squares) if add is None else add(total, squares), None

    return jax.lax.scan(step, total, jax.tree.map(split, batch))[0]


@jax.named_scope("importance")
def drawn_squares(network: Network, params: Params, batch: Batch, key: PRNGKeyArray, chunk: int) -> Params:
    """The squared gradient of `-log p(y)` summed over a batch, with every target `y` drawn from the model itself.

    One forward and backward pass over the whole batch. Its expectation is the sum over scored positions of the Fisher
    information of each: a gradient of targets that the model draws is 0 on average, so products of the gradients of
    two positions or two rows are, too. No dropout is used.

    Args:
      network: the network.
      params: its params, of which `trained` are differentiated.
      batch: token rows; positions of weight 0 add nothing.
      key: to draw from; what a row draws follows from it and from the row's task and example (`Batch.keys`).
      chunk: see `over_positions`; static.

    Returns:
      A tree like the trained params, float32.
    """
    places = jax.vmap(lambda row: jax.random.uniform(row, batch.weights.shape[1:]))(batch.keys(key))

    def loss(part: Params) -> Float[Array, ""]:
        whole = overlay(params, part)
        states = scored_states(network.hidden(whole, batch).states, batch.predict)

        def losses(inputs: tuple[Array, Array]) -> Array:
            logits = network.logits(whole, inputs[0])
            return token_losses(logits, drawn_tokens(jax.lax.stop_gradient(logits), inputs[1]))

        return jnp.sum(over_positions(losses, (states, places), chunk) * batch.weights)

    gradient: Any = jax.grad(loss)(trained(params))
    return jax.tree.map(lambda leaf: jnp.square(leaf.astype(jnp.float32)), gradient)
