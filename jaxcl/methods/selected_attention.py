r"""Attention rows of selected heads: read for the store, and held against stored ones (SEEKR, equation 7).

With stored weights p, scores S and own weights s = softmax(S), a row's divergence is
$\sum_k p_k (\log p_k - \log s_k)$, and its gradient in the scores is $s \sum_k p_k - p$.

How many heads of a layer are asked for is known only when the batch is there: every example brings the heads that its
own task selected. A loop runs as often as the example with the most heads in this layer needs, and each time takes one
head of every example. So nothing is computed for heads and layers that nobody selected, and rows exist for one head at
a time, in both passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxcl.methods.distillation import decode_rows, encode_rows
from jaxcl.models.probe import AttentionView, selected_pairs, selected_rows, visible_keys

# The smallest weight that float32 resolves.
_TINY = float(jnp.finfo(jnp.float32).tiny)
Carry = TypeVar("Carry")
Rows = Float[Array, "batch selected queries length"] | UInt8[Array, "batch selected queries length"]


class AttentionTeacher(NamedTuple):
    """Stored attention rows, as one layer sees them.

    Attributes:
      rows: weights of all selected heads, float32, or coded by `encode_rows`.
      heads: which of this layer's heads each of them is, -1 for those of other layers; see `heads_of_layers`.
      queries: which query positions, -1 for none.
    """

    rows: Rows
    heads: Int[Array, "batch selected"]
    queries: Int[Array, "batch queries"]


def heads_of_layers(heads: Int[Array, "batch selected 2"], layers: int) -> Int[Array, "layers batch selected"]:
    """Selected heads as each layer sees them: -1 for those of other layers.

    Examples:
      >>> heads_of_layers(jnp.array([[[0, 3], [1, 2]]]), 2).tolist()
      [[[3, -1]], [[-1, 2]]]
    """
    layer = jnp.arange(layers)[:, None, None]
    return jnp.where(heads[..., 0] == layer, heads[..., 1], -1).astype(jnp.int32)


def write_rows(view: AttentionView, teacher: AttentionTeacher) -> Rows:
    """`teacher.rows` with those of this layer's heads put in, in the dtype (and code) that they have.

    Args:
      view: queries and keys of the layer.
      teacher: where the rows of which heads and queries go.
    """

    def add(place: Array, stored: Array) -> Array:
        head = _take(teacher.heads, place)
        rows = selected_rows(view, head[:, None], teacher.queries)[:, 0]
        rows = encode_rows(rows) if stored.dtype == jnp.uint8 else rows
        return _put(stored, place, jnp.where(head[:, None, None] >= 0, rows, _take(stored, place)))

    return _over_heads(teacher.heads, add, teacher.rows)


@jax.named_scope("distil")
def attention_divergence(
    view: AttentionView, teacher: AttentionTeacher
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """KL of stored attention rows and this layer's own.

    The rows are computed again in the backward pass instead of being kept for it; of each, one number is kept.

    Args:
      view: queries and keys of the layer.
      teacher: stored rows; no gradient flows into them.

    Returns:
      Each example's mean over its (head, query) pairs, 0 if it has none, and whether it has any.
    """
    real = jnp.any(visible_keys(view, teacher.queries), axis=2)
    count = jnp.sum(teacher.heads >= 0, axis=1) * jnp.sum(real, axis=1)
    sums = _sums(_Kind(view.causal, view.scale), view.query, view.key, view.segments, teacher)
    return sums / jnp.maximum(count, 1), count > 0


class _Kind(NamedTuple):
    causal: bool
    scale: float


class _Compared(NamedTuple):
    """Rows of one head of each example; heads and queries that are none weigh 0."""

    head: Int[Array, " batch"]
    query: Float[Array, "batch queries head_dim"]
    key: Float[Array, "batch length head_dim"]
    stored: Float[Array, "batch queries length"]
    scores: Float[Array, "batch queries length"]
    weight: Float[Array, "batch queries"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(kind: _Kind, query: Array, key: Array, segments: Array, teacher: AttentionTeacher) -> Float[Array, " batch"]:
    """Each example's sum over its (head, query) pairs."""
    return _forward(kind, query, key, segments, teacher)[0]


def _forward(
    kind: _Kind, query: Array, key: Array, segments: Array, teacher: AttentionTeacher
) -> tuple[Array, tuple[Any, ...]]:
    view = AttentionView(query, key, segments, kind.causal, kind.scale)
    seen = visible_keys(view, teacher.queries)

    def add(place: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        total, norms = carry
        rows = _compare(view, teacher, seen, place)
        norm = jnp.where(jnp.any(seen, axis=2), jax.nn.logsumexp(rows.scores, axis=-1, where=seen), 0.0)
        logs = jnp.log(jnp.maximum(rows.stored, _TINY)) - (rows.scores - norm[..., None])
        divergence = jnp.sum(jnp.where(rows.stored > 0, rows.stored * logs, 0.0), axis=-1)
        return total + jnp.sum(divergence * rows.weight, axis=-1), _put(norms, place, norm)

    zeros = jnp.zeros(len(query)), jnp.zeros(teacher.rows.shape[:3])
    total, norms = _over_heads(teacher.heads, add, zeros)
    return total, (query, key, segments, teacher, norms)


def _backward(kind: _Kind, kept: tuple[Any, ...], cotangent: Float[Array, " batch"]) -> tuple[Array, Array, None, None]:
    query, key, segments, teacher, norms = kept
    view = AttentionView(query, key, segments, kind.causal, kind.scale)
    seen = visible_keys(view, teacher.queries)
    group = query.shape[2] // key.shape[2]
    # Where each position stands among the queries: gradients come back by a gather, not by a scatter over positions.
    asked, index = _places(teacher.queries, query.shape[1])

    def add(place: Array, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
        rows = _compare(view, teacher, seen, place)
        factor = cotangent[:, None, None] * rows.weight[..., None] * kind.scale
        own = jnp.where(seen, jnp.exp(rows.scores - _take(norms, place)[..., None]), 0.0)
        dscores = factor * (own * jnp.sum(rows.stored, axis=-1, keepdims=True) - rows.stored)
        dscores = dscores.astype(query.dtype)
        dqueries = jnp.einsum("bql,bld->bqd", dscores, rows.key, preferred_element_type=jnp.float32)
        dquery = jnp.where(asked[..., None], jnp.take_along_axis(dqueries, index[..., None], axis=1), 0.0)
        dkey = jnp.einsum("bql,bqd->bld", dscores, rows.query, preferred_element_type=jnp.float32)
        add_head = jax.vmap(lambda total, head, new: total.at[:, head].add(new))
        return add_head(gradients[0], rows.head, dquery), add_head(gradients[1], rows.head // group, dkey)

    zeros = jnp.zeros(query.shape, jnp.float32), jnp.zeros(key.shape, jnp.float32)
    dquery, dkey = _over_heads(teacher.heads, add, zeros)
    return dquery.astype(query.dtype), dkey.astype(key.dtype), None, None


_sums.defvjp(_forward, _backward)


def _over_heads(
    heads: Int[Array, "batch selected"], add: Callable[[Int[Array, " batch"], Carry], Carry], carry: Carry
) -> Carry:
    """Folds `add` over the places of this layer's heads; an example that has run out of them comes with others'."""
    here = heads >= 0
    order = jnp.argsort(~here, axis=1, stable=True)
    return jax.lax.fori_loop(0, jnp.max(jnp.sum(here, axis=1)), lambda turn, carry: add(order[:, turn], carry), carry)


def _compare(view: AttentionView, teacher: AttentionTeacher, seen: Array, place: Int[Array, " batch"]) -> _Compared:
    head, stored = _take(teacher.heads, place), _take(teacher.rows, place)
    query, key = (pair[:, 0] for pair in selected_pairs(view, head[:, None], teacher.queries))
    scores = jnp.einsum("bqd,bld->bql", query, key, preferred_element_type=jnp.float32) * view.scale
    stored = decode_rows(stored) if stored.dtype == jnp.uint8 else stored
    weight = (jnp.any(seen, axis=2) & (head >= 0)[:, None]).astype(jnp.float32)
    return _Compared(jnp.maximum(head, 0), query, key, stored, scores, weight)


def _places(queries: Int[Array, "batch queries"], length: int) -> tuple[Bool[Array, "b l"], Int[Array, "b l"]]:
    """Whether each position is asked for, and its place among the queries."""

    def places(queries: Array) -> Array:
        return (
            jnp.full(length, -1).at[jnp.where(queries < 0, length, queries)].set(jnp.arange(len(queries)), mode="drop")
        )

    index = jax.vmap(places)(queries)
    return index >= 0, jnp.maximum(index, 0)


def _take(values: Array, place: Int[Array, " batch"]) -> Array:
    """Each example's value at its place along the second axis."""
    return jax.vmap(lambda values, place: values[place])(values, place)


def _put(values: Array, place: Int[Array, " batch"], new: Array) -> Array:
    """`values` with each example's value at its place replaced."""
    return jax.vmap(lambda values, place, new: values.at[place].set(new))(values, place, new)
