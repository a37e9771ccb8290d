r"""What heads give at some queries, $o = \sum_k p_k v_k$: read for a store, and compared with what is stored.

A head's attention row weighs one vector of values per token. Instead of the weights, their effect can be distilled: a
vector of `head_dim` numbers per query, however long the row is. It also holds what the weights do not say, the values.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcl.functional.attention_rows import AttentionView, visible_keys


class ValueTeacher(NamedTuple):
    """Stored vectors, as one layer sees them.

    Attributes:
      values: of all selected heads at the stored queries.
      heads: which of this layer's heads each of them is, -1 for those of other layers; see `heads_of_layers`.
      queries: query positions, -1 for none.
    """

    values: Float[Array, "batch selected queries head_dim"]
    heads: Int[Array, "batch selected"]
    queries: Int[Array, "batch queries"]


def head_values(
    view: AttentionView, heads: Int[Array, "batch selected"], queries: Int[Array, "batch queries"]
) -> Float[Array, "batch selected queries head_dim"]:
    """What some heads give at some queries, before the output projection.

    Args:
      view: one layer's attention, with `attended`.
      heads: indices of heads, -1 for none.
      queries: indices of query positions, -1 for none.

    Returns:
      Vectors, float32; zeros where the head or query is -1, or the query is padding.

    Raises:
      ValueError: `view` has no `attended`.
    """
    if view.attended is None:
        raise ValueError("view.attended: expected what attention gave, got None")
    take = jax.vmap(lambda attended, heads, queries: attended[queries[None, :], heads[:, None]])
    found = take(view.attended, jnp.maximum(heads, 0), jnp.maximum(queries, 0)).astype(jnp.float32)
    return jnp.where(_real(view, heads, queries)[..., None], found, 0.0)


def write_values(view: AttentionView, teacher: ValueTeacher) -> Float[Array, "batch selected queries head_dim"]:
    """`teacher.values` with those of this layer's heads put in, in the dtype that they have.

    Args:
      view: the layer's attention.
      teacher: where the vectors of which heads and queries go.
    """
    found = head_values(view, teacher.heads, teacher.queries).astype(teacher.values.dtype)
    return jnp.where((teacher.heads >= 0)[..., None, None], found, teacher.values)


@jax.named_scope("distil")
def value_divergence(
    view: AttentionView, teacher: ValueTeacher
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    r"""How far what this layer's heads give is from what is stored, relative to its size.

    Per head $\sum_q \|o_q - o'_q\|^2 / \sum_q \|o'_q\|^2$ over the stored queries $q$, with the stored vectors $o'$.

    Args:
      view: the layer's attention.
      teacher: stored vectors; no gradient flows into them.

    Returns:
      Each example's mean over its heads of this layer, 0 if it has none, and whether it has any.
    """
    stored = jax.lax.stop_gradient(teacher.values.astype(jnp.float32))
    real = _real(view, teacher.heads, teacher.queries)[..., None]
    apart = jnp.where(real, head_values(view, teacher.heads, teacher.queries) - stored, 0.0)
    size = jnp.sum(jnp.square(jnp.where(real, stored, 0.0)), axis=(2, 3))
    # A head that gave nothing at all has nothing to be compared with.
    known = size > 0
    relative = jnp.sum(jnp.square(apart), axis=(2, 3)) / jnp.where(known, size, 1.0)
    count = jnp.sum(known, axis=1)
    return jnp.sum(jnp.where(known, relative, 0.0), axis=1) / jnp.maximum(count, 1), count > 0


def _real(view: AttentionView, heads: Array, queries: Array) -> Bool[Array, "batch selected queries"]:
    return jnp.any(visible_keys(view, queries), axis=2)[:, None] & (heads >= 0)[:, :, None]
