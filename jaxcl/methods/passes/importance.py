"""Importance of a network's units for general knowledge and for a domain (DAS, section 3.1).

An example is a row: where text is packed (`data.packing`), the documents of a row count as one. How rows are put into
batches changes nothing, not even the dropout that general knowledge is measured by. The exception is a model's own
dropout of attention, whose draws also depend on the padded length of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcl.functional.contrastive import pool
from jaxcl.functional.distillation import divergence
from jaxcl.functional.importance import ImportanceSums, gate_gradients
from jaxcl.functional.losses import example_means, over_positions, scored_states
from jaxcl.methods.passes.losses import example_losses
from jaxcl.models.axes import constrain
from jaxcl.models.batch import Batch
from jaxcl.models.gates import Gates
from jaxcl.models.network import Network, Params

Proxy = Literal["outputs", "pooled"]


@jax.named_scope("importance")
def add_domain_importance(
    network: Network, sums: ImportanceSums, params: Params, batch: Batch, chunk: int
) -> ImportanceSums:
    """Adds a batch to the importance for the batch's own loss (domain knowledge). No dropout is used.

    Args:
      network: the network.
      sums: what was added so far.
      params: the network's params.
      batch: token rows; those without a scored position add nothing.
      chunk: see `over_positions`; static.
    """

    def losses(gates: Gates) -> Array:
        states = network.hidden(params, batch, gates=gates).states
        return example_losses(network, params, states, batch, chunk)

    return _add(network, sums, losses, batch)


@jax.named_scope("importance")
def add_general_importance(
    network: Network,
    sums: ImportanceSums,
    params: Params,
    batch: Batch,
    key: Array,
    dropout_rate: float | None,
    chunk: int,
    proxy: Proxy = "outputs",
) -> ImportanceSums:
    """Adds a batch to the importance for what the model knew before (general knowledge, DAS equation 2).

    The proxy loss is `dropout_divergence`: the units that make the model robust matter to what it knows.

    Args:
      network: the network.
      sums: what was added so far.
      params: the network's params.
      batch: token rows.
      key: for the two dropout masks; what a row draws follows from it and from the row's task and example
        (`Batch.keys`).
      dropout_rate: see `Network.hidden`; `None` keeps the model's own rates. Static.
      chunk: see `over_positions`; static.
      proxy: see `dropout_divergence`; static.
    """

    def losses(gates: Gates) -> Array:
        return dropout_divergence(network, params, batch, key, gates, dropout_rate, chunk, proxy)

    return _add(network, sums, losses, batch)


def dropout_divergence(
    network: Network,
    params: Params,
    batch: Batch,
    key: Array,
    gates: Gates | None,
    dropout_rate: float | None,
    chunk: int,
    proxy: Proxy = "outputs",
) -> Float[Array, " batch"]:
    """`KL(f1(x) || f2(x))` of two passes under different dropout, in nats.

    Both passes run as one batch that holds every row twice, each time with a key of its own: an example's divergence
    does not depend on the other rows. (In the authors' code the passes run in evaluation mode, so that they are equal,
    and compare hidden states.)

    Args:
      network: the network.
      params: its params.
      batch: token rows.
      key: for dropout, see `Batch.keys`.
      gates: with a batch axis, or none; both passes of an example share its gates.
      dropout_rate: see `Network.hidden`; `None` keeps the model's own rates. Static.
      chunk: see `over_positions`; static.
      proxy: what f is. `outputs`: the distributions over tokens at the scored positions; their mean divergence is
        taken. `pooled`: the softmax over the units of the row's mean state (`pool`). Static.

    Returns:
      Each row's divergence; 0 for rows without scored positions (`outputs`) or tokens (`pooled`).
    """
    twice = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), batch)
    if gates is not None:
        gates = jax.tree.map(lambda gate: jnp.repeat(gate, 2, axis=1), gates)
    keys = jax.vmap(jax.random.split)(batch.keys(key)).reshape(-1)
    states = network.hidden(params, twice, gates=gates, dropout_key=keys, dropout_rate=dropout_rate).states
    if proxy == "pooled":
        pooled = pool(states, twice.segments)
        return divergence(pooled[0::2], pooled[1::2])
    states = scored_states(states, twice.predict)
    states = states.reshape(batch.size, 2, *states.shape[1:])

    def compare(part: tuple[Array, Array]) -> Array:
        return divergence(*(network.logits(params, side) for side in part))

    return example_means(over_positions(compare, (states[:, 0], states[:, 1]), chunk), batch.weights)


def _add(
    network: Network, sums: ImportanceSums, losses: Callable[[Gates], Float[Array, " batch"]], batch: Batch
) -> ImportanceSums:
    ones = jax.tree.map(lambda gate: constrain(gate, None, "batch", None), network.gates(batch.size))
    return sums.add(gate_gradients(losses, ones), jnp.sum(batch.weights, axis=1) > 0)
