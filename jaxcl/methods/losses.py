"""Scores of tokens without an array of all positions times all tokens, and the losses made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcl.methods.base import Params, Term, Terms
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network

PyTree = Any


def scored_states(states: Float[Array, "batch length embed"], batch: Batch) -> Float[Array, "batch predict embed"]:
    """The states at the positions whose output is scored."""
    if batch.predict is None:
        return states
    return jnp.take_along_axis(states, batch.predict[..., None], axis=1)


def extent(values: Array) -> Int[Array, " batch"]:
    """How many places of each row `[batch, places]` there are up to the last that is not 0."""
    return jnp.max(jnp.where(values != 0, jnp.arange(1, values.shape[1] + 1), 0), axis=1)


def over_positions(function: Callable[[PyTree], PyTree], inputs: PyTree, chunk: int) -> PyTree:
    """`function(inputs)`, at most `chunk` positions at a time.

    The parts are computed one after the other, and again in the backward pass, so that what `function` holds between
    input and output (token scores, for example) exists for one part only. Rows are never taken apart: a batch that is
    split over devices stays where it is.

    Args:
      function: takes leaves `[batch, positions, ...]`, gives leaves `[batch, positions, ...]`; positions are
        independent of each other.
      inputs: leaves `[batch, positions, ...]`.
      chunk: positions at a time; 0 takes all at once.

    Examples:
      >>> over_positions(lambda x: 2 * x, jnp.ones((1, 5)), chunk=2).tolist()
      [[2.0, 2.0, 2.0, 2.0, 2.0]]
    """
    positions = jax.tree.leaves(inputs)[0].shape[1]
    if chunk == 0 or positions <= chunk:
        return function(inputs)
    parts = -(-positions // chunk)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, parts * chunk - positions)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(x.shape[0], parts, chunk, *x.shape[2:]).swapaxes(0, 1)

    def join(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(x.shape[1], parts * chunk, *x.shape[3:])[:, :positions]

    return jax.tree.map(join, jax.lax.map(jax.checkpoint(function), jax.tree.map(split, inputs)))


def token_losses(logits: Float[Array, "... vocab"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    """`-log softmax(logits)[target]` in nats.

    Left to automatic differentiation on purpose: that keeps the exponentials for the backward pass, and measured
    faster on CPUs than hand-written gradients that compute them again or subtract a one-hot array.

    Examples:
      >>> float(jnp.exp(-token_losses(jnp.log(jnp.array([0.25, 0.75])), jnp.array(1))))
      0.75
    """
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target


def cross_entropy(
    network: Network,
    params: Params,
    states: Float[Array, "batch predict embed"],
    targets: Int[Array, "batch predict"],
    weights: Float[Array, "batch predict"],
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of the network's token scores.

    Args:
      network: the network.
      params: its params.
      states: its states at the scored positions.
      targets: the token expected at each.
      weights: 1 where the score counts, else 0.
      chunk: see `over_positions`; static.

    Returns:
      Weighted sum of the losses in nats, and sum of the weights.
    """
    losses = _token_losses(network, params, states, targets, chunk)
    return jnp.sum(losses * weights), jnp.sum(weights)


def language_model_loss(network: Network, params: Params, states: Array, batch: Batch, chunk: int) -> Term:
    """The term of a batch's own targets, from the states of all its positions `[batch, length, embed]`."""
    return Term(*cross_entropy(network, params, scored_states(states, batch), batch.targets, batch.weights, chunk))


def language_model_terms(network: Network, params: Params, batch: Batch, key: Array, chunk: int) -> Terms:
    """What plain training minimises: next-token or masked-token cross-entropy, under dropout if the model has any.

    Args:
      network: the network.
      params: its params.
      batch: token rows.
      key: for dropout.
      chunk: see `over_positions`; static.

    Returns:
      `{"loss": Term}`; the count is the number of scored tokens.
    """
    states = network.hidden(params, batch, dropout_key=key).states
    return {"loss": language_model_loss(network, params, states, batch, chunk)}


def example_losses(
    network: Network, params: Params, states: Float[Array, "batch length embed"], batch: Batch, chunk: int
) -> Float[Array, " batch"]:
    """Each row's own mean cross-entropy over its scored positions, in nats; 0 for rows without any."""
    losses = _token_losses(network, params, scored_states(states, batch), batch.targets, chunk)
    return example_means(losses, batch.weights)


def example_means(
    values: Float[Array, "batch predict"], weights: Float[Array, "batch predict"]
) -> Float[Array, " batch"]:
    """Each row's weighted mean; 0 where all weights are 0."""
    total = jnp.sum(weights, axis=1)
    return jnp.sum(values * weights, axis=1) / jnp.where(total == 0, 1.0, total)


def _token_losses(network: Network, params: Params, states: Array, targets: Array, chunk: int) -> Array:
    def losses(part: tuple[Array, Array]) -> Array:
        return token_losses(network.logits(params, part[0]), part[1])

    return over_positions(losses, (states, targets), chunk)
