"""Keys and values that generation keeps. Layers with a window keep the window only.

Axis letters: b batch, s place in the cache, k key/value heads, g query heads per key/value head, d head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcl.models.attention import in_window
from jaxcl.models.axes import constrain
from jaxcl.models.layer import Context
from jaxcl.models.mask import capped


class Store(NamedTuple):
    """Keys (after rotary) and values of some layers, compute dtype.

    The length is inside the heads: a layer's slice is then a batch of matrices as the products want them.
    """

    keys: Float[Array, "layers batch kv_heads cache head_dim"]
    values: Float[Array, "layers batch kv_heads cache head_dim"]

    @property
    def size(self) -> int:
        """Number of places."""
        return self.keys.shape[3]

    def put(self, key: Array, value: Array, number: Array, place: Array, own: Bool[Array, ""] | None = None) -> Store:
        """One token's keys and values, put at `place` of layer `number`; where `own` is false, nothing changes."""
        zero = jnp.int32(0)
        at = (number, zero, zero, place, zero)

        def put(leaf: Array, new: Array) -> Array:
            new = new.swapaxes(1, 2)[None].astype(leaf.dtype)
            if own is not None:  # one token's worth of copying, not the whole store's
                new = jnp.where(own, new, jax.lax.dynamic_slice(leaf, at, new.shape))
            return constrain_cache(jax.lax.dynamic_update_slice(leaf, new, at))

        return Store(put(self.keys, key), put(self.values, value))


class Seen(NamedTuple):
    """Which places of each store a token sees; see `Cache.seen`."""

    full: Bool[Array, "batch cache"] | None
    window: Bool[Array, "batch window"] | None


class Cache(NamedTuple):
    """What all layers keep.

    Attributes:
      full: of layers that attend to the whole text; `None` without any.
      window: of layers that attend to a window; token p is in place `p % window`. `None` without any, or if no text is
        longer than the window.
    """

    full: Store | None
    window: Store | None

    @classmethod
    def of_prompt(cls, store: Store, windowed: Sequence[bool], window: int, room: int) -> Cache:
        """A cache with `room` more places.

        Args:
          store: what all layers gave for the prompt.
          windowed: which layers need to keep no more than a window.
          window: its size in tokens.
          room: places for tokens to come.
        """
        which = np.array(windowed)

        def longer(leaf: Array, room: int) -> Array:
            return constrain_cache(jnp.pad(leaf, [(0, 0)] * 3 + [(0, room), (0, 0)]))

        def ring(leaf: Array) -> Array:
            prompt = leaf.shape[3]
            if prompt < window:
                return longer(leaf, window - prompt)
            return constrain_cache(jnp.roll(leaf[:, :, :, prompt - window :], prompt % window, axis=3))

        def of(layers: np.ndarray) -> Store:
            return store if layers.all() else jax.tree.map(lambda leaf: leaf[np.flatnonzero(layers)], store)

        full = None if which.all() else jax.tree.map(lambda leaf: longer(leaf, room), of(~which))
        return cls(full, jax.tree.map(ring, of(which)) if which.any() else None)

    def numbers(self, windowed: Sequence[bool]) -> Int[Array, " layers"]:
        """The number of each layer in its store."""
        if self.full is None or self.window is None:
            return jnp.arange(len(windowed), dtype=jnp.int32)
        return jnp.array([list(windowed[:place]).count(own) for place, own in enumerate(windowed)], jnp.int32)

    def seen(self, place: Int[Array, ""], padding: Int[Array, " batch"]) -> Seen:
        """What a token at `place` sees, after `put`. `padding` places at a row's start are empty."""

        def seen(index: Array) -> Array:
            return (index >= padding[:, None]) & (index <= place)

        full, window = None, None
        if self.full is not None:
            full = seen(jnp.arange(self.full.size))
        if self.window is not None:
            index = jnp.arange(self.window.size)
            window = seen(place - (place - index) % self.window.size)  # the tokens that are in the ring now
        return Seen(full, window)

    def step(
        self,
        query: Float[Array, "batch 1 heads head_dim"],
        key: Float[Array, "batch 1 kv_heads head_dim"],
        value: Float[Array, "batch 1 kv_heads head_dim"],
        *,
        number: Int[Array, ""],
        place: Int[Array, ""],
        seen: Seen,
        context: Context,
    ) -> tuple[Cache, Float[Array, "batch 1 heads head_dim"]]:
        """One token in one layer.

        Args:
          query: its queries.
          key: its keys, which are put into the cache.
          value: its values, likewise.
          number: of the layer in its store, see `numbers`.
          place: of the token in its row.
          seen: what it sees.
          context: of the layer.

        Returns:
          The cache with the token, and attended values.
        """
        own = context.windowed if self.full is not None and self.window is not None else None
        full, window = self
        if full is not None:
            full = full.put(key, value, number, place, None if own is None else ~own)
        if window is not None:
            window = window.put(key, value, number, place % window.size, own)
        # Of the store that a cache lacks, the function is never called.
        attend = [
            functools.partial(_attend, store, query, number, places, context)
            for store, places in ((window, seen.window), (full, seen.full))
        ]
        if own is not None:
            either = map(in_window, attend, (context.window, None))
            return Cache(full, window), jax.lax.cond(own, *either)
        return Cache(full, window), attend[window is None]()


def _attend(store: Store | None, query: Array, number: Array, seen: Array | None, context: Context) -> Array:
    """Attention of one query per row to what layer `number` holds."""
    assert store is not None
    assert seen is not None
    keys, values = (jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False) for leaf in store)
    return cached_attention(query, keys, values, seen, context.scale, context.cap)


def cached_attention(
    query: Float[Array, "batch 1 heads head_dim"],
    keys: Float[Array, "batch kv_heads cache head_dim"],
    values: Float[Array, "batch kv_heads cache head_dim"],
    seen: Bool[Array, "batch cache"],
    scale: float,
    cap: float | None = None,
) -> Float[Array, "batch 1 heads head_dim"]:
    """Attention of one query per row to the places of a cache that are `seen`; softmax in float32.

    Args:
      query: queries; head h reads key/value head `h // (heads / kv_heads)`.
      keys: cached keys.
      values: cached values.
      seen: which places hold something the row may attend to.
      scale: factor on the products of queries and keys.
      cap: soft cap of the scaled products.

    Returns:
      Attended values, dtype of `query`.
    """
    batch, _, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bkgd,bksd->bkgs", grouped, keys, preferred_element_type=jnp.float32) * scale
    # Finite, so that a row of padding only gives something finite.
    scores = jnp.where(seen[:, None, None], capped(scores, cap), jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgs,bksd->bkgd", probs, values).reshape(query.shape).astype(query.dtype)


def constrain_cache(leaf: Array) -> Array:
    """A store's array, split over devices as keys and values are."""
    return constrain(leaf, None, "batch", "kv_heads", None, None)
