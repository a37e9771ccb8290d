r"""Attention in plain XLA, a block of queries at a time, with a backward pass of its own.

With scores $S = \tau Q K^T$, probabilities $P = e^{S - n}$ (n the log of the sum of exponentials of a row) and
$O = P V$, the gradients are $dV = P^T dO$, $dS = P \circ (dO\,V^T - (dO \cdot O))$, $dQ = \tau\,dS\,K$ and
$dK = \tau\,dS^T Q$ (Dao et al. 2022, arXiv 2205.14135, section B.2): of the forward pass, only O and n are kept.

Axis letters: b batch, q query position, s key position, k key/value heads, g query heads per key/value head,
d head_dim.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxcl.models.mask import HIDDEN, capped, kernel_mask

# Measured on CPUs at length 512: 8 blocks are faster than 4 (or 16); each block is program text of its own.
_MOST_BLOCKS = 8
_SMALLEST_BLOCK = 64


def blocked_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    *,
    segments: Int[Array, "batch length"],
    causal: bool,
    scale: float,
    packed: bool = True,
    window: int | None = None,
    cap: float | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """See `jaxcl.models.attention.attention`.

    A causal block leaves out the keys after its last query, which halves the work, a window those that are too far
    away, and the scores of one block fit a cache.

    Args:
      query: as there.
      key: as there.
      value: as there.
      segments: as there.
      causal: as there.
      scale: as there.
      packed: as there.
      window: as there.
      cap: as there.

    Returns:
      Attended values, dtype of `query`.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    # Heads before positions: then the products are plain batched matrix products, without a transposition each.
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    out = _attend(grouped, key, value, segments, Pairs(causal, scale, packed, window, cap))
    return out.transpose(0, 3, 1, 2, 4).reshape(query.shape)


class Pairs(NamedTuple):
    """Which pairs of queries and keys are compared, and how; as in `attention`. Static."""

    causal: bool
    scale: float
    packed: bool
    window: int | None
    cap: float | None


class _Kept(NamedTuple):
    """What the backward pass needs; `norm` is the log of each row's sum of exponentials."""

    query: Float[Array, "b k g q d"]
    key: Float[Array, "b k s d"]
    value: Float[Array, "b k s d"]
    segments: Int[Array, "b s"]
    out: Float[Array, "b k g q d"]
    norm: Float[Array, "b k g q 1"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, segments: Array, kind: Pairs) -> Array:
    return _forward(query, key, value, segments, kind)[0]


def _blocks(length: int, causal: bool, window: int | None) -> list[tuple[slice, slice]]:
    """Queries of each block, and the keys that they may see.

    >>> [(keys.start, keys.stop) for _, keys in _blocks(200, True, 20)]
    [(0, 64), (45, 128), (109, 192), (173, 200)]
    """
    size = max(_SMALLEST_BLOCK, -(-length // _MOST_BLOCKS))
    ends = [(start, min(start + size, length)) for start in range(0, length, size)]
    reach = length if window is None else window - 1

    def keys(start: int, end: int) -> slice:
        return slice(max(0, start - reach), end if causal else min(length, end + reach))

    return [(slice(start, end), keys(start, end)) for start, end in ends]


def _forward(query: Array, key: Array, value: Array, segments: Array, kind: Pairs) -> tuple[Array, _Kept]:
    outs, norms = [], []
    for rows, seen in _blocks(query.shape[3], kind.causal, kind.window):
        mask = kernel_mask(segments, kind.causal, kind.packed, rows, seen, kind.window)
        scores = _product("bkgqd,bksd->bkgqs", query[:, :, :, rows], key[:, :, seen]) * kind.scale
        scores = jnp.where(mask, capped(scores, kind.cap), HIDDEN)
        highest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _product("bkgqs,bksd->bkgqd", weights.astype(value.dtype), value[:, :, seen]) / total
        outs.append(out.astype(value.dtype))
        norms.append(highest + jnp.log(total))
    out, norm = jnp.concatenate(outs, axis=3), jnp.concatenate(norms, axis=3)
    return out, _Kept(query, key, value, segments, out, norm)


def _backward(kind: Pairs, kept: _Kept, dout: Array) -> tuple[Array, Array, Array, None]:
    inner = jnp.sum(dout.astype(jnp.float32) * kept.out.astype(jnp.float32), axis=-1)[:, :, :, None]
    norm = kept.norm.swapaxes(3, 4)
    dqueries = []
    dkey, dvalue = (jnp.zeros(array.shape, jnp.float32) for array in (kept.key, kept.value))
    for rows, seen in _blocks(kept.query.shape[3], kind.causal, kind.window):
        # Keys before queries: then the sums over queries, for keys and values, are plain products too.
        mask = kernel_mask(kept.segments, kind.causal, kind.packed, rows, seen, kind.window).swapaxes(3, 4)
        query, key, value = kept.query[:, :, :, rows], kept.key[:, :, seen], kept.value[:, :, seen]
        dblock = dout[:, :, :, rows]
        scores = capped(_product("bksd,bkgqd->bkgsq", key, query) * kind.scale, kind.cap)
        probs = jnp.exp(jnp.where(mask, scores - norm[..., rows], -jnp.inf))
        dprobs = _product("bksd,bkgqd->bkgsq", value, dblock)
        dscores = probs * (dprobs - inner[..., rows]) * kind.scale
        if kind.cap is not None:  # the slope of the soft cap
            dscores = dscores * (1 - jnp.square(scores / kind.cap))
        dscores = dscores.astype(query.dtype)
        dvalue = dvalue.at[:, :, seen].add(_product("bkgsq,bkgqd->bksd", probs.astype(dblock.dtype), dblock))
        dkey = dkey.at[:, :, seen].add(_product("bkgsq,bkgqd->bksd", dscores, query))
        dqueries.append(_product("bkgsq,bksd->bkgqd", dscores, key))
    dquery = jnp.concatenate(dqueries, axis=3)
    return dquery.astype(kept.query.dtype), dkey.astype(kept.key.dtype), dvalue.astype(kept.value.dtype), None


def _product(letters: str, left: Array, right: Array) -> Array:
    return jnp.einsum(letters, left, right, preferred_element_type=jnp.float32)


_attend.defvjp(_forward, _backward)
