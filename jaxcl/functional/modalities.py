r"""Attention by modality: parts of a row's divergence, and measures of heads by block of attention.

Keys are of modalities, such as words and images. A row of attention weights p says how much goes to each modality,
$P_m = \sum_{k \in m} p_k$, and how it is spread within each, $p_k / P_m$. By the chain rule, its divergence from
another row q falls into the same parts, exactly:

$$KL(p \| q) = KL(P \| Q) + \sum_m P_m \, KL(p_{\cdot | m} \| q_{\cdot | m})$$

so that stored rows serve for every weighting of the parts. A block of attention is a modality of queries and one of
keys; that of words on images is cross-modal attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MODALITIES = ("text", "image")
"""Modalities by number."""

BLOCKS = tuple(f"{query}_{key}" for query in MODALITIES for key in MODALITIES)
"""Blocks of attention by number: the modality of the queries, then that of the keys."""

_TINY = float(jnp.finfo(jnp.float32).tiny)


class SplitDivergence(NamedTuple):
    """The parts of a row's divergence, in nats; they sum to it.

    Attributes:
      mass: divergence of what goes to each modality.
      within: divergences within each modality, times the share of the first row that goes to it.
    """

    mass: Float[Array, "..."]
    within: Float[Array, "... modalities"]

    def weighted(self, weights: PartWeights) -> Float[Array, "..."]:
        """The sum of the parts, each with its weight."""
        return weights.mass * self.mass + jnp.sum(jnp.array(weights[1:]) * self.within, axis=-1)


class PartWeights(NamedTuple):
    """Weights of the parts of a row's divergence; with 1, 1, 1 their sum is the divergence.

    Attributes:
      mass: of the divergence of what goes to words and to images.
      text: of the divergence within words.
      image: of that within images: for queries of words, how cross-modal attention is spread.
    """

    mass: float = 1.0
    text: float = 1.0
    image: float = 1.0


def split_divergence(
    weights: Float[Array, "... keys"],
    log_others: Float[Array, "... keys"],
    modality: Int[Array, "... keys"],
) -> SplitDivergence:
    """The parts of KL of two rows of attention weights.

    Args:
      weights: the first row, p; it need not sum to 1.
      log_others: logarithms of the second row, q; anything, minus infinity too, where p is 0.
      modality: number of each key's modality; broadcasts to the rows.

    Examples:
      >>> p, q = jnp.array([0.5, 0.25, 0.25]), jnp.array([0.25, 0.25, 0.5])
      >>> parts = split_divergence(p, jnp.log(q), jnp.array([0, 0, 1]))
      >>> [round(float(x), 4) for x in (parts.mass, *parts.within, jnp.sum(p * jnp.log(p / q)))]
      [0.1308, 0.0425, 0.0, 0.1733]
    """
    used = weights > 0
    logs = jnp.where(used, log_others, 0.0)
    each = jnp.where(used, weights * (jnp.log(jnp.maximum(weights, _TINY)) - logs), 0.0)
    own = [jnp.broadcast_to(modality == number, weights.shape) for number in range(len(MODALITIES))]
    total = jnp.stack([jnp.sum(jnp.where(one, each, 0.0), axis=-1) for one in own], axis=-1)
    mine = jnp.stack([jnp.sum(jnp.where(one, weights, 0.0), axis=-1) for one in own], axis=-1)
    theirs = jnp.stack([jax.nn.logsumexp(log_others, axis=-1, where=one) for one in own], axis=-1)
    between = jnp.where(mine > 0, mine * (jnp.log(jnp.maximum(mine, _TINY)) - jnp.where(mine > 0, theirs, 0.0)), 0.0)
    return SplitDivergence(jnp.sum(between, axis=-1), total - between)


def split_slopes(
    weights: Float[Array, "... keys"],
    others: Float[Array, "... keys"],
    modality: Int[Array, "... keys"],
    parts: PartWeights,
) -> Float[Array, "... keys"]:
    r"""Gradient of the weighted parts in the scores S of q = softmax(S).

    For a key of modality m with weight w_m: $w_0 (q \sum p - P_m q / Q_m) + w_m (P_m q / Q_m - p)$, which with equal
    weights is $q \sum p - p$.

    Args:
      weights: p.
      others: q.
      modality: number of each key's modality; broadcasts to the rows.
      parts: weights of the parts.
    """
    within, factor = jnp.zeros_like(others), jnp.zeros_like(others)
    for number, weight in enumerate(parts[1:]):
        own = jnp.broadcast_to(modality == number, weights.shape)
        mine, theirs = (jnp.sum(jnp.where(own, row, 0.0), axis=-1, keepdims=True) for row in (weights, others))
        within = jnp.where(own, others * (mine / jnp.where(theirs > 0, theirs, 1.0)), within)
        factor = jnp.where(own, weight, factor)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return parts.mass * (others * total - within) + factor * (within - weights)


def block_squares(
    squares: Float[Array, "batch heads query length"], modality: Int[Array, "batch length"]
) -> Float[Array, "blocks heads"]:
    """Sums of each head's values over the pairs of each block.

    Args:
      squares: a value for each pair, 0 for pairs that do not count.
      modality: number of each position's modality.

    Examples:
      >>> squares = jnp.array([[[[1.0, 0.0], [2.0, 4.0]]]])
      >>> block_squares(squares, jnp.array([[1, 0]])).ravel().tolist()
      [4.0, 2.0, 0.0, 1.0]
    """
    own = [modality == number for number in range(len(MODALITIES))]
    blocks = [query[:, None, :, None] & key[:, None, None, :] for query in own for key in own]
    return jnp.stack([jnp.sum(jnp.where(block, squares, 0.0), axis=(0, 2, 3)) for block in blocks])


@jax.custom_vjp
def _watch(probs: Array, seen: Array, modality: Array, dummy: Array) -> Array:
    return probs


def _watch_forward(probs: Array, seen: Array, modality: Array, dummy: Array) -> tuple[Array, tuple[Array, Array]]:
    return probs, (seen, modality)


def _watch_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, None, Array]:
    seen, modality = kept
    square = jnp.where(seen, jnp.square(cotangent.astype(jnp.float32)), 0.0)
    return cotangent, None, None, block_squares(square, modality)


_watch.defvjp(_watch_forward, _watch_backward)


def watch_blocks(
    probs: Float[Array, "batch heads query length"],
    seen: Bool[Array, "batch 1 query length"],
    modality: Int[Array, "batch length"],
    dummy: Float[Array, "blocks heads"],
) -> Float[Array, "batch heads query length"]:
    """`jaxcl.functional.watch` by block: the gradient of `dummy` is each head's sum of squares in each block.

    Args:
      probs: attention probabilities.
      seen: which pairs count.
      modality: number of each position's modality.
      dummy: zeros; its gradient is the result.
    """
    return _watch(probs, seen, modality, dummy)


def select_by_block(
    importance: Float[Array, "blocks layers heads"], layers: int, budgets: Sequence[int], per_layer: int
) -> Int[Array, "selected 2"]:
    """The most important heads of each block, a number of them for each; no head twice.

    Block after block, the `layers` layers with the largest total are chosen, and in these the heads with the largest
    importance that no block before has. Of equals, the first comes first.

    Args:
      importance: of each head for each block, 0 or more, in the order of `BLOCKS`.
      layers: number of layers for each block; static.
      budgets: number of heads for each block; static, together at most `layers * per_layer`.
      per_layer: the most heads selected in one layer, over all blocks; static.

    Returns:
      (layer, head) of each selected head, in rising order, int32.

    Examples:
      >>> importance = jnp.array([[[3.0, 1.0], [0.0, 0.0]], [[2.0, 0.0], [5.0, 0.0]]])
      >>> select_by_block(importance, 2, (1, 1), 2).tolist()
      [[0, 0], [1, 0]]
    """
    shape = importance.shape[1:]
    chosen = jnp.zeros(shape, bool)
    for rating, budget in zip(importance, budgets, strict=True):
        order = jnp.argsort(-jnp.sum(rating, axis=1), stable=True)
        here = jnp.zeros(shape[0], bool).at[order[:layers]].set(True)
        free = jnp.where(chosen, -jnp.inf, rating)
        places = jnp.argsort(jnp.argsort(-free, axis=1, stable=True), axis=1)
        room = per_layer - jnp.sum(chosen, axis=1, keepdims=True)
        flat = jnp.where(here[:, None] & ~chosen & (places < room), rating, -jnp.inf).reshape(-1)
        best = jnp.argsort(-flat, stable=True)[:budget]
        chosen = chosen.reshape(-1).at[best].set(True).reshape(shape)
    best = jnp.flatnonzero(chosen, size=sum(budgets))
    return jnp.stack([best // shape[1], best % shape[1]], axis=-1).astype(jnp.int32)
