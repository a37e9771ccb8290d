r"""Attention rows of selected heads: read for a store, and compared with stored ones (SEEKR, equation 7).

With stored weights p, scores S and own weights s = softmax(S), a row's divergence is
$\sum_k p_k (\log p_k - \log s_k)$, and its gradient in the scores is $s \sum_k p_k - p$.

How many heads of a layer are needed is known only at run time: every example has the heads that its own task selected.
A loop runs as often as the example with the most heads in this layer needs, and each trip takes one head of every
example. Nothing is computed for heads and layers that were not selected, and in both passes rows exist for one head at
a time.

Many queries are worked through in blocks: queries rise, so behind a causal mask the early ones see the first keys only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxcl.functional.attention_rows import (
    AttentionView,
    CodedRows,
    decode_rows,
    encode_rows,
    selected_pairs,
    selected_rows,
    visible_keys,
)
from jaxcl.functional.modalities import PartWeights, split_divergence, split_slopes

_BLOCK = 128  # queries; fewer than two blocks of them are not divided
# The smallest weight that float32 resolves.
_TINY = float(jnp.finfo(jnp.float32).tiny)
Carry = TypeVar("Carry")
AttentionRows = Float[Array, "batch selected queries length"] | CodedRows


class AttentionTeacher(NamedTuple):
    """Stored attention rows, as one layer sees them.

    Attributes:
      rows: weights of all selected heads, float32, or coded by `encode_rows`.
      heads: which of this layer's heads each of them is, -1 for those of other layers; see `heads_of_layers`.
      queries: query positions, strictly rising; rows have their padding on the right. An example with fewer of them
        than there is room for has its first positions and then -1: `sample_queries` draws that way.
    """

    rows: AttentionRows
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


def write_rows(view: AttentionView, teacher: AttentionTeacher) -> AttentionRows:
    """`teacher.rows` with those of this layer's heads put in, in the dtype (and code) that they have.

    Args:
      view: queries and keys of the layer.
      teacher: where the rows of which heads and queries go.
    """

    def add(place: Array, stored: AttentionRows) -> AttentionRows:
        head = _take(teacher.heads, place)
        exact = selected_rows(view, head[:, None], teacher.queries)[:, 0]
        rows = encode_rows(exact) if isinstance(stored, CodedRows) else exact

        def put(before: Array, new: Array) -> Array:
            real = (head >= 0).reshape(-1, *[1] * (new.ndim - 1))
            return _put(before, place, jnp.where(real, new, _take(before, place)))

        return jax.tree.map(put, stored, rows)

    return _over_heads(teacher.heads, add, teacher.rows)


@jax.named_scope("distil")
def attention_divergence(
    view: AttentionView,
    teacher: AttentionTeacher,
    modality: Int[Array, "batch length"] | None = None,
    parts: PartWeights | None = None,
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """KL of stored attention rows and this layer's own.

    The rows are computed again in the backward pass instead of being kept for it; of each, one number is kept.

    Args:
      view: queries and keys of the layer.
      teacher: stored rows; no gradient flows into them.
      modality: number of each position's modality (`jaxcl.functional.MODALITIES`), with `parts`.
      parts: weights of the parts into which a row's divergence falls by modality; static. `None`: all are 1.

    Returns:
      Each example's mean over its (head, query) pairs, 0 if it has none, and whether it has any. A query that comes
      twice counts once.
    """
    again = jnp.pad(teacher.queries[:, 1:] == teacher.queries[:, :-1], ((0, 0), (1, 0)))
    teacher = teacher._replace(queries=jnp.where(again, -1, teacher.queries))
    real = jnp.any(visible_keys(view, teacher.queries), axis=2)
    count = jnp.sum(teacher.heads >= 0, axis=1) * jnp.sum(real, axis=1)
    if modality is None or parts is None:
        modality = parts = None
    static = _Attention(view.causal, view.scale, view.cap, parts)
    sums = _sums(static, view.query, view.key, view.segments, view.window, teacher, modality)
    return sums / jnp.maximum(count, 1), count > 0


@jax.named_scope("distil")
def example_divergence(
    layer_means: Float[Array, "layers batch"], present: Bool[Array, "layers batch"]
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """Each example's mean over its own layers that have any selected head, and whether it has such a layer.

    The authors' code sums over the layers that any example of the batch selected and divides by their number, so that
    the term shrinks as tasks add layers. Where all examples select heads in the same layers the two agree; with two
    tasks that share two of six layers, this one is 1.5 times as large. The paper's weight of 1000 belongs to theirs.

    Args:
      layer_means: what `attention_divergence` gave for each layer.
      present: whether the example has a selected head there, likewise.
    """
    layers = jnp.sum(present, axis=0)
    return jnp.sum(jnp.where(present, layer_means, 0.0), axis=0) / jnp.maximum(layers, 1), layers > 0


class _Attention(NamedTuple):
    causal: bool
    scale: float
    cap: float | None
    parts: PartWeights | None


class _Head(NamedTuple):
    """One head of each example; missing heads and queries have weight 0."""

    head: Int[Array, " batch"]
    query: Float[Array, "batch queries head_dim"]
    key: Float[Array, "batch length head_dim"]
    stored: AttentionRows
    weight: Float[Array, "batch queries"]


class _Block(NamedTuple):
    """Some queries and the keys that they may see. Static."""

    queries: slice
    keys: slice

    def rows(self, values: Array) -> Array:
        """Its part of `[batch, queries, length]`."""
        return values[:, self.queries, self.keys]

    def scores(self, one: _Head, view: AttentionView) -> Float[Array, "batch some_queries some_keys"]:
        """What the softmax is taken of."""
        query, key = one.query[:, self.queries], one.key[:, self.keys]
        return view.scores(jnp.einsum("bqd,bld->bql", query, key, preferred_element_type=jnp.float32))

    def stored(self, one: _Head) -> Float[Array, "batch some_queries some_keys"]:
        """Stored weights."""
        if isinstance(one.stored, CodedRows):
            return decode_rows(CodedRows(self.rows(one.stored.codes), one.stored.largest[:, self.queries]))
        return self.rows(one.stored)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    static: _Attention,
    query: Array,
    key: Array,
    segments: Array,
    window: Any,
    teacher: AttentionTeacher,
    modality: Array | None,
) -> Float[Array, " batch"]:
    """Each example's sum over its (head, query) pairs."""
    return _forward(static, query, key, segments, window, teacher, modality)[0]


def _forward(
    static: _Attention,
    query: Array,
    key: Array,
    segments: Array,
    window: Any,
    teacher: AttentionTeacher,
    modality: Array | None,
) -> tuple[Array, tuple[Any, ...]]:
    view = AttentionView(query, key, segments, static.causal, static.scale, window, static.cap)
    seen = visible_keys(view, teacher.queries)

    def compare(block: _Block, one: _Head) -> tuple[Array, Array]:
        scores, stored, visible = block.scores(one, view), block.stored(one), block.rows(seen)
        norm = jnp.where(jnp.any(visible, axis=2), jax.nn.logsumexp(scores, axis=-1, where=visible), 0.0)
        if static.parts is not None and modality is not None:
            own = jnp.where(visible, scores - norm[..., None], -jnp.inf)
            split = split_divergence(stored, own, modality[:, None, block.keys])
            return split.weighted(static.parts), norm
        logs = jnp.log(jnp.maximum(stored, _TINY)) - (scores - norm[..., None])
        return jnp.sum(jnp.where(stored > 0, stored * logs, 0.0), axis=-1), norm

    def add(place: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        one = _head(view, teacher, seen, place)
        parts = [compare(block, one) for block in _blocks(seen.shape, static.causal)]
        divergence, norm = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        return carry[0] + jnp.sum(divergence * one.weight, axis=-1), _put(carry[1], place, norm)

    zeros = jnp.zeros(len(query)), jnp.zeros((*teacher.heads.shape, teacher.queries.shape[1]))
    total, norms = _over_heads(teacher.heads, add, zeros)
    return total, (query, key, segments, window, teacher, modality, norms)


def _backward(
    static: _Attention, kept: tuple[Any, ...], cotangent: Float[Array, " batch"]
) -> tuple[Array, Array, None, None, None, None]:
    query, key, segments, window, teacher, modality, norms = kept
    view = AttentionView(query, key, segments, static.causal, static.scale, window, static.cap)
    seen = visible_keys(view, teacher.queries)
    group = query.shape[2] // key.shape[2]
    # The place of each position among the queries: gradients come back by a gather, not by a scatter over positions.
    asked, index = _places(teacher.queries, query.shape[1])

    def differ(block: _Block, one: _Head, norm: Array) -> tuple[Array, Array]:
        stored, factor = block.stored(one), cotangent[:, None] * one.weight[:, block.queries] * static.scale
        scores = block.scores(one, view)
        own = jnp.exp(scores - norm[:, block.queries, None])
        own = jnp.where(block.rows(seen), own, 0.0)
        if static.parts is not None and modality is not None:
            slopes = split_slopes(stored, own, modality[:, None, block.keys], static.parts)
        else:
            slopes = own * jnp.sum(stored, axis=-1, keepdims=True) - stored
        dscores = factor[..., None] * slopes
        if static.cap is not None:  # the slope of the soft cap
            dscores = dscores * (1 - jnp.square(scores / static.cap))
        dscores = dscores.astype(query.dtype)
        dquery = jnp.einsum("bql,bld->bqd", dscores, one.key[:, block.keys], preferred_element_type=jnp.float32)
        dkey = jnp.einsum("bql,bqd->bld", dscores, one.query[:, block.queries], preferred_element_type=jnp.float32)
        return dquery, jnp.pad(dkey, ((0, 0), (0, query.shape[1] - dkey.shape[1]), (0, 0)))

    def add(place: Array, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
        one, norm = _head(view, teacher, seen, place), _take(norms, place)
        parts = [differ(block, one, norm) for block in _blocks(seen.shape, static.causal)]
        dqueries, dkey = jnp.concatenate([part[0] for part in parts], axis=1), sum(part[1] for part in parts)
        dquery = jnp.where(asked[..., None], jnp.take_along_axis(dqueries, index[..., None], axis=1), 0.0)
        add_head = jax.vmap(lambda total, head, new: total.at[:, head].add(new.astype(total.dtype)))
        return add_head(gradients[0], one.head, dquery), add_head(gradients[1], one.head // group, dkey)

    # A query head is selected once, so its gradient is not a sum; that of a key head shared by several queries is.
    zeros = jnp.zeros_like(query), jnp.zeros(key.shape, key.dtype if group == 1 else jnp.float32)
    dquery, dkey = _over_heads(teacher.heads, add, zeros)
    return dquery.astype(query.dtype), dkey.astype(key.dtype), None, None, None, None


_sums.defvjp(_forward, _backward)


def _over_heads(
    heads: Int[Array, "batch selected"], add: Callable[[Int[Array, " batch"], Carry], Carry], carry: Carry
) -> Carry:
    """Folds `add` over this layer's heads; examples with fewer heads here are padded with heads of weight 0."""
    here = heads >= 0
    order = jnp.argsort(~here, axis=1, stable=True)
    return jax.lax.fori_loop(0, jnp.max(jnp.sum(here, axis=1)), lambda trip, carry: add(order[:, trip], carry), carry)


def _blocks(shape: tuple[int, ...], causal: bool) -> list[_Block]:
    """Parts of rows `[batch, queries, length]`.

    Queries rise, so number i of Q is at most at position `length - Q + i`: Q - 1 - i others follow it. In a row with
    fewer than Q real positions they are its first ones.

    >>> [(block.queries.stop, block.keys.stop) for block in _blocks((1, 300, 400), True)]
    [(128, 228), (256, 356), (300, 400)]
    >>> len(_blocks((1, 300, 400), False)), len(_blocks((1, 100, 400), True))
    (1, 1)
    """
    _, queries, length = shape
    if not causal or not 2 * _BLOCK <= queries <= length:
        return [_Block(slice(0, queries), slice(0, length))]
    parts = [slice(start, min(start + _BLOCK, queries)) for start in range(0, queries, _BLOCK)]
    return [_Block(part, slice(0, length - queries + part.stop)) for part in parts]


def _head(view: AttentionView, teacher: AttentionTeacher, seen: Array, place: Int[Array, " batch"]) -> _Head:
    head = _take(teacher.heads, place)
    query, key = (pair[:, 0] for pair in selected_pairs(view, head[:, None], teacher.queries))
    weight = (jnp.any(seen, axis=2) & (head >= 0)[:, None]).astype(jnp.float32)
    return _Head(jnp.maximum(head, 0), query, key, _take(teacher.rows, place), weight)


def _places(queries: Int[Array, "batch queries"], length: int) -> tuple[Bool[Array, "b l"], Int[Array, "b l"]]:
    """Whether each position is asked for, and its place among the queries."""

    def places(queries: Array) -> Array:
        return (
            jnp.full(length, -1).at[jnp.where(queries < 0, length, queries)].set(jnp.arange(len(queries)), mode="drop")
        )

    index = jax.vmap(places)(queries)
    return index >= 0, jnp.maximum(index, 0)


def _take(values: PyTree, place: Int[Array, " batch"]) -> PyTree:
    """Each example's value at its place along the second axis, of every array."""
    return jax.vmap(lambda values, place: jax.tree.map(lambda one: one[place], values))(values, place)


def _put(values: Array, place: Int[Array, " batch"], new: Array) -> Array:
    """`values` with each example's value at its place replaced."""
    return jax.vmap(lambda values, place, new: values.at[place].set(new))(values, place, new)
