"""Looking into attention from outside: a probe reads beside the fast kernel, a tap stands in the explicit path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PyTree = Any


class AttentionView(NamedTuple):
    """What a probe sees of one layer's attention.

    Attributes:
      query: queries after the rotary embedding.
      key: keys after the rotary embedding.
      segments: document number of each position, 0 for padding.
      causal: whether later positions are hidden.
      scale: factor on the products of queries and keys.
    """

    query: Float[Array, "batch length heads head_dim"]
    key: Float[Array, "batch length kv_heads head_dim"]
    segments: Int[Array, "batch length"]
    causal: bool
    scale: float


@dataclasses.dataclass(frozen=True)
class Probe:
    """Computes something beside each layer's attention, which keeps its fast kernel.

    Attributes:
      function: from `AttentionView` and the layer's `inputs` to a pytree of arrays. It runs inside the scan, and
        is recomputed with the layer under rematerialisation. Results come back stacked along `layers`.
      inputs: pytree with leaves `[layers, ...]`.
    """

    function: Callable[[AttentionView, PyTree], PyTree]
    inputs: PyTree = None


@dataclasses.dataclass(frozen=True)
class Tap:
    """Stands in each layer's attention, between the softmax and the product with the values.

    Attributes:
      function: from probabilities `[batch, heads, length, length]` float32, the mask `[batch, 1, length, length]`
        of real (query, key) pairs and the layer's `inputs` to probabilities. The identity with a gradient of its
        own is a typical one. Rows of padding hold something finite.
      inputs: pytree with leaves `[layers, ...]`.
    """

    function: Callable[[Float[Array, "batch heads query length"], Bool[Array, "batch 1 query length"], PyTree], Array]
    inputs: PyTree = None


def selected_rows(
    view: AttentionView, heads: Int[Array, "batch selected"], queries: Int[Array, "batch queries"]
) -> Float[Array, "batch selected queries length"]:
    """Attention probabilities of some heads at some query positions, by an exact softmax over the visible keys.

    Args:
      view: queries and keys of one layer.
      heads: indices of heads, -1 for none.
      queries: indices of query positions, -1 for none.

    Returns:
      Probabilities, float32. Rows whose head or query is -1, or whose query is padding, are zero.
    """
    scores = jnp.einsum("bsqd,bsld->bsql", *selected_pairs(view, heads, queries), preferred_element_type=jnp.float32)
    seen = visible_keys(view, queries)[:, None] & (heads >= 0)[:, :, None, None]
    return jax.nn.softmax(scores * view.scale, axis=-1, where=seen)


def selected_pairs(
    view: AttentionView, heads: Int[Array, "batch selected"], queries: Int[Array, "batch queries"]
) -> tuple[Float[Array, "batch selected queries head_dim"], Float[Array, "batch selected length head_dim"]]:
    """Queries of some heads at some positions, and all keys of these heads; anything where an index is -1."""
    group = view.query.shape[2] // view.key.shape[2]

    def pairs(query: Array, key: Array, heads: Array, queries: Array) -> tuple[Array, Array]:
        return query[queries[None, :], heads[:, None]], key[:, heads // group].swapaxes(0, 1)

    return jax.vmap(pairs)(view.query, view.key, jnp.maximum(heads, 0), jnp.maximum(queries, 0))


def visible_keys(view: AttentionView, queries: Int[Array, "batch queries"]) -> Bool[Array, "batch queries length"]:
    """Which keys some query positions see; none for a query that is -1 or padding."""
    position = jnp.maximum(queries, 0)
    own = jnp.take_along_axis(view.segments, position, axis=1)
    seen = (own[:, :, None] == view.segments[:, None, :]) & (own != 0)[:, :, None] & (queries >= 0)[:, :, None]
    if view.causal:
        seen &= position[:, :, None] >= jnp.arange(view.segments.shape[1])
    return seen
