r"""Distillation of output distributions, and the compact forms that teachers are kept in (SEEKR, section 3.4).

Divergences are $KL(\text{teacher} \,\|\, \text{student})$ in nats. Teachers are data: no gradient flows into them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

# Float32 resolves no smaller remainders of 1; both sides of a divergence are limited alike.
_EPSILON = float(jnp.finfo(jnp.float32).eps)


class TopScores(NamedTuple):
    """The likeliest tokens of a position; the rest of the distribution is what they leave of 1.

    Attributes:
      ids: token ids, int32.
      values: their log-probabilities, float32.
      drawn_ids: tokens drawn from the rest in proportion to their probability, int32; a token may come twice. `None`:
        none are drawn.
      drawn_values: their log-probabilities, float32.
    """

    ids: Int[Array, "... top"]
    values: Float[Array, "... top"]
    drawn_ids: Int[Array, "... drawn"] | None = None
    drawn_values: Float[Array, "... drawn"] | None = None


def top_scores(
    logits: Float[Array, "... vocab"], count: int, drawn: int = 0, lots: Float[Array, "..."] | None = None
) -> TopScores:
    """Log-probabilities of the `count` likeliest tokens, and of some drawn from the others.

    Drawing is systematic: the others' probabilities, laid one after the other, are cut into `drawn` equal parts, and
    one token is taken from each part at the same place in it. So drawn, a token comes as often, on average, as in
    independent draws, but with less chance in it.

    Args:
      logits: scores.
      count: how many of the likeliest; not all tokens if any shall be drawn.
      drawn: how many are drawn.
      lots: the place in the parts, uniform in [0, 1), a position; needed where `drawn` is above 0.
    """
    logs = jax.nn.log_softmax(logits, axis=-1)
    values, ids = jax.lax.top_k(logs, count)
    if drawn == 0:
        return TopScores(ids.astype(jnp.int32), values)
    assert lots is not None
    others = jnp.put_along_axis(jnp.exp(logs), ids, 0.0, axis=-1, inplace=False)
    below = jnp.cumsum(others, axis=-1)
    places = (jnp.arange(drawn) + lots[..., None]) / drawn * below[..., -1:]
    search = jnp.vectorize(lambda row, at: jnp.searchsorted(row, at, side="right"), signature="(v),(d)->(d)")
    # Rounding may put the last place at the very end, behind all tokens.
    drawn_ids = jnp.minimum(search(below, places), logits.shape[-1] - 1).astype(jnp.int32)
    return TopScores(ids.astype(jnp.int32), values, drawn_ids, jnp.take_along_axis(logs, drawn_ids, axis=-1))


@jax.named_scope("distil")
def top_divergence(teacher: TopScores, logits: Float[Array, "... vocab"]) -> Float[Array, "..."]:
    r"""KL over the teacher's likeliest tokens, and over the rest as far as it is known.

    $\sum_{k} p_k (\log p_k - \log s_k)$ over the likeliest, plus for the rest, with the remainder
    $p_r = 1 - \sum_k p_k$, one of

    - with drawn tokens, $p_r$ times their mean $\log p_j - \log s_j$: the full divergence and its gradient, on
      average over the draw;
    - without, $p_r (\log p_r - \log s_r)$, all other tokens as one: never more than the full divergence, and equal
      to it where the two agree on the rest but for a factor.
    """
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    student = jnp.take_along_axis(logits, teacher.ids, axis=-1) - total
    probs = jnp.exp(teacher.values)
    rest = _remainder(probs)
    divergence = jnp.sum(probs * (teacher.values - student), axis=-1)
    if teacher.drawn_ids is not None and teacher.drawn_values is not None:
        others = jnp.take_along_axis(logits, teacher.drawn_ids, axis=-1) - total
        return divergence + rest * jnp.mean(teacher.drawn_values - others, axis=-1)
    return divergence + rest * (jnp.log(rest) - jnp.log(_remainder(jnp.exp(student))))


@jax.named_scope("distil")
def full_divergence(teacher: Float[Array, "... vocab"], logits: Float[Array, "... vocab"]) -> Float[Array, "..."]:
    """KL of the whole distributions.

    Args:
      teacher: log-probabilities.
      logits: the student's scores.
    """
    return jnp.sum(jnp.exp(teacher) * (teacher - jax.nn.log_softmax(logits, axis=-1)), axis=-1)


def encode_rows(rows: Float[Array, "... length"]) -> UInt8[Array, "... length"]:
    """Attention rows in 8 bits: roots of the weights, in 255ths of the row's largest.

    Roots spend the steps where a divergence is sensitive, and reach down to a 260,000th of the largest weight. The
    scale is not kept: rows sum to 1.

    Examples:
      >>> encode_rows(jnp.array([[0.8, 0.2, 0.0]])).tolist()
      [[255, 128, 0]]
    """
    largest = jnp.max(rows, axis=-1, keepdims=True)
    shares = rows / jnp.where(largest == 0, 1.0, largest)
    return jnp.round(255.0 * jnp.sqrt(shares)).astype(jnp.uint8)


def decode_rows(coded: UInt8[Array, "... length"]) -> Float[Array, "... length"]:
    """What `encode_rows` coded, scaled to sum 1 again; rows of zeros stay."""
    weights = jnp.square(coded.astype(jnp.float32))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)


@jax.named_scope("distil")
def example_divergence(
    layer_means: Float[Array, "layers batch"], present: Bool[Array, "layers batch"]
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """Each example's mean over the layers that have any selected head, and whether it has such a layer."""
    layers = jnp.sum(present, axis=0)
    return jnp.sum(jnp.where(present, layer_means, 0.0), axis=0) / jnp.maximum(layers, 1), layers > 0


def sample_queries(
    keys: Key[Array, " batch"], segments: Int[Array, "batch length"], budget: int
) -> Int[Array, "batch queries"]:
    """Query positions drawn without replacement from each row's real ones.

    A row's draw follows from its key and its real positions: other rows and padding behind it change nothing.

    Args:
      keys: a random key a row.
      segments: 0 for padding.
      budget: how many; 0 takes all. Static.

    Returns:
      Positions in rising order, int32; -1 behind them where a row has fewer.
    """
    length = segments.shape[1]
    budget = length if budget == 0 else budget
    lots = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
    lots = jnp.where(segments != 0, lots, -1.0)
    values, drawn = jax.lax.top_k(lots, min(budget, length))
    drawn = jnp.sort(jnp.where(values >= 0, drawn, length), axis=1)
    drawn = jnp.where(drawn < length, drawn, -1).astype(jnp.int32)
    return jnp.pad(drawn, ((0, 0), (0, budget - drawn.shape[1])), constant_values=-1)


def _remainder(probs: Float[Array, "... top"]) -> Float[Array, "..."]:
    return jnp.maximum(1.0 - jnp.sum(probs, axis=-1), _EPSILON)
