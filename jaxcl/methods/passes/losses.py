"""The language-model loss of a network."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcl.functional.losses import Gate, chunked_token_losses, cross_entropy, example_means, scored_states
from jaxcl.functional.terms import Term, Terms
from jaxcl.models.batch import Batch
from jaxcl.models.experts import balance_loss
from jaxcl.models.network import Hidden, Network, Params


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
      `{"loss": Term}`; the count is the number of scored tokens. With `router_terms`, if there are any.
    """
    hidden = network.hidden(params, batch, dropout_key=key)
    loss = language_model_loss(network, params, hidden.states, batch, chunk, gate)
    return {"loss": loss, **router_terms(network, hidden, batch)}


def router_terms(network: Network, hidden: Hidden, batch: Batch) -> dict[str, Term]:
    """What a network with experts adds to any loss: the load-balancing loss of its routers (`balance_loss`).

    It is one number for a whole batch. Of micro-batches it is the mean, weighted by their real tokens.

    Args:
      network: the network.
      hidden: the pass that the rest of the loss is computed from.
      batch: its token rows.

    Returns:
      `{"router": Term}`; the count is the number of real tokens. Nothing where `model.router_loss_weight` is 0.
    """
    if hidden.load is None:
        return {}
    tokens = jnp.sum((batch.segments != 0).astype(jnp.float32))
    return {"router": Term(balance_loss(hidden.load, tokens) * tokens, tokens, network.router_loss_weight)}


def example_losses(
    network: Network, params: Params, states: Float[Array, "batch length embed"], batch: Batch, chunk: int
) -> Float[Array, " batch"]:
    """Each row's own mean cross-entropy over its scored positions, in nats; 0 for rows without any."""
    logits = functools.partial(network.logits, params)
    losses = chunked_token_losses(logits, scored_states(states, batch.predict), batch.targets, chunk)
    return example_means(losses, batch.weights)
