"""Which queries see which keys.

Axis letters: b batch, q query position, s key position.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a hidden pair: large and finite, so that a row without a visible key gives no NaN."""


def visible(segments: Int[Array, "batch length"], causal: bool) -> Bool[Array, "batch 1 length length"]:
    """Which (query, key) pairs are real: same non-zero segment, key not later if causal."""
    pairs = (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None, :]
    if causal:
        index = jnp.arange(segments.shape[1])
        pairs &= index[:, None] >= index[None, :]
    return pairs[:, None]


def kernel_mask(
    segments: Int[Array, "batch length"],
    causal: bool,
    packed: bool,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Bool[Array, "#batch 1 1 #q s"]:
    """Pairs that a kernel compares. Agrees with `visible` wherever the query is real, and costs less.

    Padding sees padding, so that no row is empty. Where padding comes last, a causal mask alone hides it.
    """
    index = jnp.arange(segments.shape[1])
    earlier = index[rows, None] >= index[None, columns]
    if not packed:
        return earlier[None, None, None] if causal else (segments != 0)[:, None, None, None, columns]
    pairs = segments[:, rows, None] == segments[:, None, columns]
    return (pairs & earlier if causal else pairs)[:, None, None]
