"""Attention probabilities of chosen heads at chosen queries, from queries and keys, and their compact form.

Attention itself can stay on its fast kernel: a row is computed separately, by an exact softmax over visible keys.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

_LARGEST, _STEPS = 255, 254.0  # the code of a row's largest weight; that of the second largest


class AttentionView(NamedTuple):
    """What a probe sees of one layer's attention.

    Attributes:
      query: queries after the rotary embedding.
      key: keys after the rotary embedding.
      segments: document number of each position, 0 for padding.
      causal: whether later positions are hidden.
      scale: factor on the products of queries and keys.
      window: a query sees only keys that are less than this many tokens away; `None`: no limit.
      cap: soft cap of the scaled products, `cap * tanh(scores / cap)`; `None`: none.
      attended: what attention gave, before the output projection.
    """

    query: Float[Array, "batch length heads head_dim"]
    key: Float[Array, "batch length kv_heads head_dim"]
    segments: Int[Array, "batch length"]
    causal: bool
    scale: float
    window: int | Int[Array, ""] | None = None
    cap: float | None = None
    attended: Float[Array, "batch length heads head_dim"] | None = None

    def scores(self, products: Float[Array, "..."]) -> Float[Array, "..."]:
        """What the softmax is taken of, from products of queries and keys."""
        scaled = products * self.scale
        return scaled if self.cap is None else self.cap * jnp.tanh(scaled / self.cap)


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
    return jax.nn.softmax(view.scores(scores), axis=-1, where=seen)


def attention_maps(view: AttentionView) -> Float[Array, "batch heads query length"]:
    """Attention probabilities of all heads at all queries: what attention multiplies the values by, before dropout.

    Its size is `batch * heads * length^2`; `selected_rows` computes the rows of some heads and queries alone.

    Args:
      view: queries and keys of one layer.

    Returns:
      Probabilities, float32; rows of padding are zero.
    """
    batch, length, heads, _ = view.query.shape
    every_head = jnp.broadcast_to(jnp.arange(heads), (batch, heads))
    every_query = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return selected_rows(view, every_head, every_query)


def selected_pairs(
    view: AttentionView, heads: Int[Array, "batch selected"], queries: Int[Array, "batch queries"]
) -> tuple[Float[Array, "batch selected queries head_dim"], Float[Array, "batch selected length head_dim"]]:
    """Queries of some heads at some positions, and all keys of these heads; anything where an index is -1."""
    group = view.query.shape[2] // view.key.shape[2]

    def pairs(query: Array, key: Array, heads: Array, queries: Array) -> tuple[Array, Array]:
        return query[queries[None, :], heads[:, None]], key[:, heads // group].swapaxes(0, 1)

    return jax.vmap(pairs)(view.query, view.key, jnp.maximum(heads, 0), jnp.maximum(queries, 0))


def visible_keys(view: AttentionView, queries: Int[Array, "batch queries"]) -> Bool[Array, "batch queries length"]:
    """Which keys of a layer's `view` some `queries` see; none for a query that is -1 or padding."""
    position = jnp.maximum(queries, 0)
    own = jnp.take_along_axis(view.segments, position, axis=1)
    seen = (own[:, :, None] == view.segments[:, None, :]) & (own != 0)[:, :, None] & (queries >= 0)[:, :, None]
    if view.causal:
        seen &= position[:, :, None] >= jnp.arange(view.segments.shape[1])
    if view.window is not None:
        distance = position[:, :, None] - jnp.arange(view.segments.shape[1])
        seen &= jnp.abs(distance) < view.window
    return seen


def sample_queries(
    keys: Key[Array, " batch"], segments: Int[Array, "batch length"], budget: int
) -> Int[Array, "batch queries"]:
    """Query positions drawn without replacement from each row's real ones.

    A row's draw follows from its key and its real positions: other rows and the padding behind it change nothing.

    Args:
      keys: one random key per row.
      segments: 0 for padding.
      budget: how many; 0 takes all. Static.

    Returns:
      Positions in rising order, int32; then -1 where a row has fewer.
    """
    length = segments.shape[1]
    budget = length if budget == 0 else budget
    draws = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
    draws = jnp.where(segments != 0, draws, -1.0)
    values, drawn = jax.lax.top_k(draws, min(budget, length))
    drawn = jnp.sort(jnp.where(values >= 0, drawn, length), axis=1)
    drawn = jnp.where(drawn < length, drawn, -1).astype(jnp.int32)
    return jnp.pad(drawn, ((0, 0), (0, budget - drawn.shape[1])), constant_values=-1)


class CodedRows(NamedTuple):
    """Attention rows in 8 bits; see `encode_rows`.

    Attributes:
      codes: 255 at a row's largest weight; elsewhere roots of the weights, in 254ths of that of the second largest.
      largest: the largest weight of each row; the others sum to 1 minus it.
    """

    codes: UInt8[Array, "... length"]
    largest: Float[Array, "..."]


def encode_rows(rows: Float[Array, "... length"]) -> CodedRows:
    """Codes attention rows in 8 bits.

    Roots spend the steps where a divergence is sensitive, and reach down to a 260,000th of what they are relative to.
    The largest weight is held exactly: it is often that of a sink, such as the first token, and many times the others,
    which in steps of its root would be rounded to none or to a multiple of what they are.

    Args:
      rows: weights that sum to 1, or zeros.

    Examples:
      >>> coded = encode_rows(jnp.array([[0.9, 0.08, 0.02, 0.0]]))
      >>> coded.codes.tolist(), coded.largest.tolist() == [float(jnp.float32(0.9))]
      ([[255, 254, 127, 0]], True)
    """
    largest = jnp.max(rows, axis=-1, keepdims=True)
    first = jnp.arange(rows.shape[-1]) == jnp.argmax(rows, axis=-1, keepdims=True)
    others = jnp.where(first, 0.0, rows)
    second = jnp.max(others, axis=-1, keepdims=True)
    codes = jnp.round(_STEPS * jnp.sqrt(others / jnp.where(second == 0, 1.0, second)))
    codes = jnp.where(first & (largest > 0), _LARGEST, codes).astype(jnp.uint8)
    return CodedRows(codes, largest[..., 0].astype(jnp.float32))


def decode_rows(coded: CodedRows) -> Float[Array, "... length"]:
    """What `encode_rows` coded, summing to 1 again; rows of zeros stay.

    The others' sum is what the largest leaves of 1: less than float32 resolves there (6e-8) comes back as 0.
    """
    first = coded.codes == _LARGEST
    others = jnp.where(first, 0.0, jnp.square(coded.codes.astype(jnp.float32)))
    total = jnp.sum(others, axis=-1, keepdims=True)
    largest = coded.largest[..., None]
    return jnp.where(first, largest, others * ((1.0 - largest) / jnp.where(total == 0, 1.0, total)))
