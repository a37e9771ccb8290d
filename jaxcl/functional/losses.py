"""Scores of tokens without an array of all positions times all tokens, and the losses made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

Gate = Literal["none", "probability", "entropy"]
_LIKELIEST = 20

Logits = Callable[[Float[Array, "batch positions embed"]], Float[Array, "batch positions vocab"]]
"""From states to token scores."""


def scored_states(
    states: Float[Array, "batch length embed"], predict: Int[Array, "batch predict"] | None
) -> Float[Array, "batch predict embed"]:
    """The states at the positions whose output is scored.

    Args:
      states: of all positions.
      predict: indices of the scored positions; `None` scores all of them.
    """
    return states if predict is None else jnp.take_along_axis(states, predict[..., None], axis=1)


def real_length(values: Int[Array, "batch places"] | Float[Array, "batch places"]) -> Int[Array, " batch"]:
    """Places of each row up to the last that is not 0.

    >>> real_length(jnp.array([[1, 0, 2, 0], [0, 0, 0, 0]])).tolist()
    [3, 0]
    """
    return jnp.max(jnp.where(values != 0, jnp.arange(1, values.shape[1] + 1), 0), axis=1)


def over_positions(function: Callable[[PyTree], PyTree], inputs: PyTree, chunk: int) -> PyTree:
    """`function(inputs)`, at most `chunk` positions at a time.

    The chunks are computed one after the other, and again in the backward pass, so that what `function` holds between
    input and output (token scores, for example) exists for one chunk only. Rows are never taken apart: a batch that is
    split over devices stays where it is.

    Args:
      function: takes leaves `[batch, positions, ...]`, gives leaves `[batch, positions, ...]`; positions are
        independent of each other.
      inputs: leaves `[batch, positions, ...]`.
      chunk: positions at a time; 0 takes all at once. Static.

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
    """`-log softmax(logits)[target]` for each of the `targets`, in nats.

    Left to automatic differentiation on purpose: that keeps the exponentials for the backward pass, and measured
    faster on CPUs than hand-written gradients that compute them again or subtract a one-hot array.

    Examples:
      >>> float(jnp.exp(-token_losses(jnp.log(jnp.array([0.25, 0.75])), jnp.array(1))))
      0.75
    """
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target


def token_gates(
    logits: Float[Array, "... vocab"], targets: Int[Array, "..."], gate: Literal["probability", "entropy"]
) -> Float[Array, "..."]:
    """What each token's loss is multiplied by; a constant to the gradient.

    A model forgets most where it is sure of another token than the one it is taught: there the gradient is largest.

    Args:
      logits: token scores.
      targets: the token expected at each position.
      gate: probability: the target's own, p (dynamic fine-tuning, arXiv 2508.05629). entropy: that of the 20 likeliest
        tokens, renormalised, in units of ln 20 (entropy-adaptive fine-tuning).

    Examples:
      >>> logits = jnp.log(jnp.array([0.25, 0.75]))
      >>> round(float(token_gates(logits, jnp.array(1), "probability")), 6)
      0.75
      >>> round(float(token_gates(jnp.zeros(40), jnp.array(1), "entropy")), 6)
      1.0
    """
    if gate == "probability":
        return jax.lax.stop_gradient(jnp.exp(-token_losses(logits, targets)))
    top = min(_LIKELIEST, logits.shape[-1])
    logs = jax.nn.log_softmax(jax.lax.top_k(jax.lax.stop_gradient(logits), top)[0], axis=-1)
    return -jnp.sum(jnp.exp(logs) * logs, axis=-1) / math.log(_LIKELIEST)


def gated_losses(logits: Float[Array, "... vocab"], targets: Int[Array, "..."], gate: Gate) -> Float[Array, "..."]:
    """`token_losses` times `token_gates`; without a gate, `token_losses` and nothing else."""
    losses = token_losses(logits, targets)
    return losses if gate == "none" else losses * token_gates(logits, targets, gate)


def chunked_token_losses(
    logits: Logits,
    states: Float[Array, "batch predict embed"],
    targets: Int[Array, "batch predict"],
    chunk: int,
    gate: Gate = "none",
) -> Float[Array, "batch predict"]:
    """`gated_losses` of states, in chunks; see `cross_entropy` for the arguments."""
    return over_positions(lambda part: gated_losses(logits(part[0]), part[1], gate), (states, targets), chunk)


def cross_entropy(
    logits: Logits,
    states: Float[Array, "batch predict embed"],
    targets: Int[Array, "batch predict"],
    weights: Float[Array, "batch predict"],
    chunk: int,
    gate: Gate = "none",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of token scores.

    Args:
      logits: from states to token scores; called for one chunk of positions at a time.
      states: the network's states at the scored positions.
      targets: the token expected at each.
      weights: 1 where the score counts, else 0.
      chunk: see `over_positions`; static.
      gate: see `token_gates`; static.

    Returns:
      Weighted sum of the losses in nats, and sum of the weights.
    """
    return jnp.sum(chunked_token_losses(logits, states, targets, chunk, gate) * weights), jnp.sum(weights)


def example_means(
    values: Float[Array, "batch predict"], weights: Float[Array, "batch predict"]
) -> Float[Array, " batch"]:
    """Each row's mean of `values` by `weights`; 0 where all weights are 0."""
    total = jnp.sum(weights, axis=1)
    return jnp.sum(values * weights, axis=1) / jnp.where(total == 0, 1.0, total)
