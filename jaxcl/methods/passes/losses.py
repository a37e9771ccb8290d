"""The language-model loss of a network."""

from __future__ import annotations

import functools

from jaxtyping import Array, Float

from jaxcl.functional.losses import Gate, chunked_token_losses, cross_entropy, example_means, scored_states
from jaxcl.functional.terms import Term, Terms
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network, Params


def language_model_loss(
    network: Network,
    params: Params,
    states: Float[Array, "batch length embed"],
    batch: Batch,
    chunk: int,
    gate: Gate = "none",
) -> Term:
    """Cross-entropy of a batch's own targets as a term.

    Args:
      network: the network.
      params: its params.
      states: its states at all positions.
      batch: token rows.
      chunk: see `over_positions`; static.
      gate: see `token_gates`; remembered rows are learned without. Static.
    """
    logits, scored = functools.partial(network.logits, params), scored_states(states, batch.predict)
    gate = "none" if batch.origin == "memory" else gate
    return Term(*cross_entropy(logits, scored, batch.targets, batch.weights, chunk, gate))


def language_model_terms(
    network: Network, params: Params, batch: Batch, key: Array, chunk: int, gate: Gate = "none"
) -> Terms:
    """What plain training minimises: next-token or masked-token cross-entropy, under dropout if the model has any.

    Args:
      network: the network.
      params: its params.
      batch: token rows.
      key: for dropout.
      chunk: see `over_positions`; static.
      gate: see `language_model_loss`.

    Returns:
      `{"loss": Term}`; the count is the number of scored tokens.
    """
    states = network.hidden(params, batch, dropout_key=key).states
    return {"loss": language_model_loss(network, params, states, batch, chunk, gate)}


def example_losses(
    network: Network, params: Params, states: Float[Array, "batch length embed"], batch: Batch, chunk: int
) -> Float[Array, " batch"]:
    """Each row's own mean cross-entropy over its scored positions, in nats; 0 for rows without any."""
    logits = functools.partial(network.logits, params)
    losses = chunked_token_losses(logits, scored_states(states, batch.predict), batch.targets, chunk)
    return example_means(losses, batch.weights)
