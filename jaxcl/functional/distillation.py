r"""Distillation of output distributions, whole or by their likeliest tokens (SEEKR, section 3.4).

Divergences are $KL(\text{teacher} \,\|\, \text{student})$ in nats. Teachers are data: no gradient flows into them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Float32 resolves no smaller remainders of 1; both sides of a divergence are limited alike.
_EPSILON = float(jnp.finfo(jnp.float32).eps)


class TopScores(NamedTuple):
    """The likeliest tokens of a position; the rest of the distribution is what they leave of 1.

    Attributes:
      ids: token ids, int32.
      values: their log-probabilities, float32.
      drawn_ids: tokens drawn from the rest in proportion to their probability, int32; a token may come twice. `None` if
        none are drawn.
      drawn_values: their log-probabilities, float32.
    """

    ids: Int[Array, "... top"]
    values: Float[Array, "... top"]
    drawn_ids: Int[Array, "... drawn"] | None = None
    drawn_values: Float[Array, "... drawn"] | None = None


def top_scores(
    logits: Float[Array, "... vocab"], count: int, drawn: int = 0, offsets: Float[Array, "..."] | None = None
) -> TopScores:
    """Log-probabilities of the `count` likeliest tokens, and of some drawn from the others.

    Drawing is systematic: the others' probabilities, laid one after the other, are cut into `drawn` equal parts, and
    one token is taken from each part at the same place in it. So drawn, a token comes as often, on average, as in
    independent draws, but with less chance in it.

    Args:
      logits: scores.
      count: how many of the likeliest; fewer than all tokens if any are drawn.
      drawn: how many are drawn.
      offsets: one uniform draw in [0, 1) per position: where in each part its token is taken. Required if `drawn` is
        above 0.

    Raises:
      ValueError: `drawn` is above 0 and `offsets` is missing.
    """
    logs = jax.nn.log_softmax(logits, axis=-1)
    values, ids = jax.lax.top_k(logs, count)
    if drawn == 0:
        return TopScores(ids.astype(jnp.int32), values)
    if offsets is None:
        raise ValueError("offsets: drawing tokens needs one uniform number per position, got None")
    others = jnp.put_along_axis(jnp.exp(logs), ids, 0.0, axis=-1, inplace=False)
    below = jnp.cumsum(others, axis=-1)
    places = (jnp.arange(drawn) + offsets[..., None]) / drawn * below[..., -1:]
    search = jnp.vectorize(lambda row, at: jnp.searchsorted(row, at, side="right"), signature="(v),(d)->(d)")
    # Rounding may put the last place at the very end, behind all tokens.
    drawn_ids = jnp.minimum(search(below, places), logits.shape[-1] - 1).astype(jnp.int32)
    return TopScores(ids.astype(jnp.int32), values, drawn_ids, jnp.take_along_axis(logs, drawn_ids, axis=-1))


@jax.named_scope("distil")
def top_divergence(teacher: TopScores, logits: Float[Array, "... vocab"]) -> Float[Array, "..."]:
    r"""KL of `teacher` and student `logits` over the likeliest tokens, and over the rest as far as it is known.

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


def divergence(first: Float[Array, "... units"], second: Float[Array, "... units"]) -> Float[Array, "..."]:
    """`KL(softmax(first) || softmax(second))` over the last axis; gradients flow into both."""
    first, second = jax.nn.log_softmax(first, axis=-1), jax.nn.log_softmax(second, axis=-1)
    return jnp.sum(jnp.exp(first) * (first - second), axis=-1)


def _remainder(probs: Float[Array, "... top"]) -> Float[Array, "..."]:
    return jnp.maximum(1.0 - jnp.sum(probs, axis=-1), _EPSILON)
