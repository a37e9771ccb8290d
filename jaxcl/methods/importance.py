r"""Importance of units for what a model knows: per-example gradients of virtual gates (DAS, section 3.1).

$I = \frac{1}{N} \sum_n |\partial L(x_n) / \partial g|$ for gates $g = 1$ on attention heads, feed-forward
intermediate units and feed-forward outputs. Each example has its own copy of the gates, so one backward pass over a
batch gives all per-example gradients, and $L(x_n)$ is the example's own mean over its scored positions: how examples
are put into batches changes nothing, not even the dropout that general knowledge is measured by (but for a model's own
dropout of attention, whose draws follow the padded length of a row as well). An example is a row: where text is packed
(`data.packing`), the documents of a row count as one. The authors' code sums gradients over examples before it takes
absolute values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcl.methods.base import Params
from jaxcl.methods.contrast import pool
from jaxcl.methods.losses import example_losses, example_means, over_positions, scored_states
from jaxcl.models.axes import constrain
from jaxcl.models.batch import Batch
from jaxcl.models.gates import Gates
from jaxcl.models.network import Network

Normalisation = Literal["tanh", "quantile"]
Proxy = Literal["outputs", "pooled"]


class ImportanceSums(NamedTuple):
    """A mean over examples in the making.

    Attributes:
      total: sums of absolute gate gradients, leaves `[layers, units]`.
      examples: how many.
    """

    total: Gates
    examples: Float[Array, ""]

    @classmethod
    def zero(cls, network: Network) -> ImportanceSums:
        """No example yet."""
        return cls(jax.tree.map(jnp.zeros_like, Gates.ones(network.config)), jnp.float32(0))

    def mean(self) -> Gates:
        """Importance before normalisation; 0 where there was no example."""
        return jax.tree.map(lambda total: total / jnp.maximum(self.examples, 1.0), self.total)


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
      chunk: see `losses.over_positions`; static.
    """

    def losses(gates: Gates) -> Array:
        states = network.hidden(params, batch, gates=gates).states
        return example_losses(network, params, states, batch, chunk)

    return _add(sums, gate_gradients(network, losses, batch.size), batch)


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

    The proxy loss is `dropout_divergence`: units on which the model's robustness rests matter to what it knows.

    Args:
      network: the network.
      sums: what was added so far.
      params: the network's params.
      batch: token rows.
      key: for the two dropout masks; with it, what a row draws follows from its task and example (`Batch.keys`).
      dropout_rate: see `Network.hidden`; `None` keeps the model's own rates. Static.
      chunk: see `losses.over_positions`; static.
      proxy: see `dropout_divergence`; static.
    """

    def losses(gates: Gates) -> Array:
        return dropout_divergence(network, params, batch, key, gates, dropout_rate, chunk, proxy)

    return _add(sums, gate_gradients(network, losses, batch.size), batch)


def gate_gradients(network: Network, losses: Callable[[Gates], Float[Array, " batch"]], size: int) -> Gates:
    """Gradient of each example's loss with respect to its own gates, in one backward pass.

    Args:
      network: the network.
      losses: from gates with a batch axis to one loss an example; examples do not influence each other.
      size: number of examples.

    Returns:
      Gradients at gates 1, leaves `[layers, batch, units]`.
    """
    ones = jax.tree.map(lambda gate: constrain(gate, None, "batch", None), Gates.ones(network.config, batch=size))
    return jax.grad(lambda gates: jnp.sum(losses(gates)))(ones)


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

    Both passes run as one batch in which every row stands twice, with a key of its own each time: other rows have no
    say in an example's divergence. (In the authors' code the passes run in evaluation mode, so that they are equal, on
    hidden states.)

    Args:
      network: the network.
      params: its params.
      batch: token rows.
      key: for dropout, see `Batch.keys`.
      gates: with a batch axis, or none; both passes of an example share its gates.
      dropout_rate: see `Network.hidden`; `None` keeps the model's own rates. Static.
      chunk: see `losses.over_positions`; static.
      proxy: what f is. `outputs`: the distributions over tokens at the scored positions; their mean divergence is
        taken. `pooled`: the softmax over the units of the row's mean state (`contrast.pool`). Static.

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
        return _divergence(pooled[0::2], pooled[1::2])
    states = scored_states(states, twice)
    states = states.reshape(batch.size, 2, *states.shape[1:])

    def divergence(part: tuple[Array, Array]) -> Array:
        return _divergence(*(network.logits(params, side) for side in part))

    return example_means(over_positions(divergence, (states[:, 0], states[:, 1]), chunk), batch.weights)


@jax.named_scope("importance")
def normalise(importance: Gates, how: Normalisation, share: float) -> Gates:
    """Importance to [0, 1], layer by layer and kind of unit by kind of unit.

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
    """`max(0, (u - (1 - share)) / share)` with the rank `u` in (0, 1) of a unit in its layer.

    The rank of a unit is the share of units below it, those equal to it counted half.

    Examples:
      >>> normalise_quantile(jnp.array([[0.1, 0.4, 0.3, 0.2]]), share=0.5).tolist()
      [[0.0, 0.75, 0.25, 0.0]]
    """

    def ranks(layer: Array) -> Array:
        ordered = jnp.sort(layer)
        below = jnp.searchsorted(ordered, layer, side="left")
        through = jnp.searchsorted(ordered, layer, side="right")
        return (below + through) / (2 * layer.size)

    return jnp.maximum(0.0, (jax.vmap(ranks)(scores) - (1.0 - share)) / share)


def accumulate(before: Gates, now: Gates) -> Gates:
    """What all domains so far need: the element-wise maximum (DAS, equation 4)."""
    return jax.tree.map(jnp.maximum, before, now)


def _divergence(first: Float[Array, "... units"], second: Float[Array, "... units"]) -> Float[Array, "..."]:
    """`KL(softmax(first) || softmax(second))` over the last axis."""
    first, second = jax.nn.log_softmax(first, axis=-1), jax.nn.log_softmax(second, axis=-1)
    return jnp.sum(jnp.exp(first) * (first - second), axis=-1)


def _add(sums: ImportanceSums, gradients: Any, batch: Batch) -> ImportanceSums:
    real = (jnp.sum(batch.weights, axis=1) > 0).astype(jnp.float32)
    total = jax.tree.map(
        lambda before, gradient: before + jnp.einsum("lbu,b->lu", jnp.abs(gradient), real), sums.total, gradients
    )
    return ImportanceSums(total, sums.examples + jnp.sum(real))
