"""Which queries see which keys.

Axis letters: b batch, q query position, s key position.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a hidden pair: large and finite, so that a row without a visible key gives no NaN."""


Window = int | Int[Array, ""] | None
"""How far a layer sees, in tokens: a query sees keys less than this far away. `None`: no limit."""


def visible(
    segments: Int[Array, "batch length"], causal: bool, window: Window = None
) -> Bool[Array, "batch 1 length length"]:
    """Which (query, key) pairs are real: same non-zero segment, key not later if causal, within the window."""
    pairs = (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None, :]
    index = jnp.arange(segments.shape[1])
    if causal:
        pairs &= index[:, None] >= index[None, :]
    if window is not None:
        pairs &= near(index[:, None], index[None, :], causal, window)
    return pairs[:, None]


def near(query: Int[Array, "..."], key: Int[Array, "..."], causal: bool, window: int | Array) -> Bool[Array, "..."]:
    """Whether keys at some places are within the window of queries at others; if causal, later keys count as near.

    >>> near(jnp.int32(4), jnp.arange(7), False, 3).tolist()
    [False, False, True, True, True, True, True]
    """
    distance = query - key
    return (distance if causal else jnp.abs(distance)) < window


def kernel_mask(
    segments: Int[Array, "batch length"],
    causal: bool,
    packed: bool,
    rows: slice = slice(None),
    columns: slice = slice(None),
    window: Window = None,
) -> Bool[Array, "#batch 1 1 #q s"]:
    """Pairs that a kernel compares. Agrees with `visible` wherever the query is real, and costs less.

    Padding sees padding, so that no row is empty. Where padding comes last, a causal mask alone hides it.
    """
    index = jnp.arange(segments.shape[1])
    query, key = index[rows, None], index[None, columns]
    placed = query >= key if causal else None
    if window is not None:
        close = near(query, key, causal, window)
        placed = close if placed is None else placed & close
    if placed is not None and causal and not packed:
        return placed[None, None, None]
    pairs = segments[:, rows, None] == segments[:, None, columns] if packed else (segments != 0)[:, None, columns]
    return (pairs if placed is None else pairs & placed)[:, None, None]


def capped(scores: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Scores bent so that they stay within `cap`: `cap * tanh(scores / cap)` (Gemma 2); as they are for `None`."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)
