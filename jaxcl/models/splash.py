"""Pallas splash attention, the kernel for TPUs: flash attention that skips blocks no query of which sees a key.

It comes with jax. tokamax wraps the same TPU kernel, adds Triton and Mosaic kernels for GPUs where cuDNN already
serves, and falls back to XLA on CPU: another dependency for nothing that is missing here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    FullMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jaxtyping import Array, Float, Int

from jaxcl.models import axes

# The kernel works on tiles of 128 lanes; larger blocks amortise its overhead, 512 still fits its fast memory.
_LANES = 128
_LARGEST_BLOCK = 512


def splash_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    *,
    segments: Int[Array, "batch length"],
    causal: bool,
    scale: float,
    packed: bool,
    window: int | None = None,
    cap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "batch length heads head_dim"]:
    """As `jaxcl.models.attention.attention`. Any length: it is padded to a multiple of 128.

    The compiler cannot partition the kernel, so on a mesh it runs on each device's own rows and heads.

    Args:
      query: queries.
      key: keys.
      value: values.
      segments: document numbers, 0 for padding.
      causal: whether later positions are hidden.
      scale: factor on the products of queries and keys.
      packed: whether a row may hold several documents.
      window: how many tokens apart a query and a key may not be; `None`: no limit.
      cap: soft cap of the scaled products.
      interpret: run in Pallas' interpreter, on any platform; for tests.

    Returns:
      Attended values, dtype of `query`.
    """
    length, heads, kv_heads = query.shape[1], query.shape[2], key.shape[2]
    parts = axes.shards("heads")
    kv_name = "kv_heads"
    if parts > 1 and heads % parts == 0 and kv_heads % parts:
        # Too few key/value heads for the devices that share the queries: every query head gets its own copy.
        key, value = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (key, value))
        kv_name = "heads"
    query = query * jnp.asarray(scale, query.dtype)
    padding = -length % _LANES
    if padding:
        wide = ((0, 0), (0, padding), (0, 0), (0, 0))
        query, key, value = (jnp.pad(x, wide) for x in (query, key, value))
        segments = jnp.pad(segments, wide[:2])
    # Where padding comes last, a causal mask alone hides it.
    masked = packed or not causal

    def local(query: Array, key: Array, value: Array, segments: Array) -> Array:
        kernel = _kernel(query.shape[2], _mask(query.shape[1], causal, window), cap, interpret)
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        if masked:
            out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=SegmentIds(s, s)))(
                query, key, value, segments
            )
        else:
            out = jax.vmap(kernel)(query, key, value)
        return jnp.swapaxes(out, 1, 2)

    query_axes = ("batch", None, "heads", None)
    key_axes = ("batch", None, kv_name, None)
    run = axes.per_shard(local, (query_axes, key_axes, key_axes, ("batch", None)), query_axes)
    return run(query, key, value, segments)[:, :length].astype(query.dtype)


def _mask(length: int, causal: bool, window: int | None) -> Any:
    square = (length, length)
    if window is not None:
        return LocalMask(square, (window - 1, 0 if causal else window - 1), 0)
    return CausalMask(square) if causal else FullMask(square)


def _kernel(heads: int, mask: Any, cap: float | None, interpret: bool) -> Callable[..., Array]:
    block = next(size for size in range(_LARGEST_BLOCK, 0, -_LANES) if mask.shape[0] % size == 0)
    return make_splash_mha(
        MultiHeadMask([mask] * heads),
        block_sizes=BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
