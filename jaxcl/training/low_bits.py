"""The low half of float32 params whose high half is all that the model holds.

A bfloat16 number has 8 significant bits. A step below 1/512 of a param, as most are at usual learning rates, would be
rounded away, and every following one too. So the trained params are float32 numbers in two parts of 16 bits: the high
one, rounded to nearest, is the bfloat16 param that the model computes with; the low one is kept in the state for the
optimizer (Split-SGD-BF16: Kalamkar et al. 2020, arXiv 2005.04680). Together they have the size of float32 params; a
float32 copy next to the params would take 2 bytes more per param. Stochastic rounding would save 2 bytes, but a run
would end only near where float32 ends; this way the optimizer's arithmetic is that of float32, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, Int16

from jaxcl.models.trainable import Params, overlay

_HALF = 0x8000


def no_low_bits(params: Mapping[str, Any]) -> Params:
    """Low parts of params that are exactly bfloat16: int16 zeros for every bfloat16 param; the others have none.

    Args:
      params: what is trained.

    Examples:
      >>> no_low_bits({"kernel": jnp.ones(2, jnp.bfloat16), "scale": jnp.ones(2)})
      {'kernel': Array([0, 0], dtype=int16)}
    """
    found: Params = {}
    for name, node in params.items():
        if isinstance(node, Mapping):
            if below := no_low_bits(node):
                found[name] = below
        elif getattr(node, "dtype", None) == jnp.bfloat16:
            found[name] = jnp.zeros(node.shape, jnp.int16)
    return found


def widen(params: Params, low_bits: Params) -> Params:
    """The float32 params of which `split` returned the parts; params without a low part stay as they are.

    Args:
      params: what is trained.
      low_bits: the low parts.
    """
    return overlay(params, jax.tree.map(_join, _like(low_bits, params), low_bits))


def split(wide: Params, low_bits: Params) -> tuple[Params, Params]:
    """Params as the model holds them, and their low parts.

    Args:
      wide: what is trained, in float32.
      low_bits: the low parts of before; what has one is split.

    Returns:
      `wide` with bfloat16 params, rounded to nearest, for those that are split; and the new low parts.
    """
    chosen = _like(low_bits, wide)
    high = jax.tree.map(_high, chosen)
    return overlay(wide, high), jax.tree.map(_low, chosen, high)


def _like(part: Mapping[str, Any], tree: Mapping[str, Any]) -> Params:
    return {k: _like(node, tree[k]) if isinstance(node, Mapping) else tree[k] for k, node in part.items()}


def _high(wide: Float32[Array, "..."]) -> BFloat16[Array, "..."]:
    # Halves are rounded up, not to even as by `astype`: the low part is then in [-0x8000, 0x7fff], which fits 16 bits.
    bits = jax.lax.bitcast_convert_type(wide, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(((bits + _HALF) >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isnan(wide), jnp.bfloat16(jnp.nan), rounded)


def _low(wide: Float32[Array, "..."], high: BFloat16[Array, "..."]) -> Int16[Array, "..."]:
    difference = jax.lax.bitcast_convert_type(wide, jnp.uint32) - _shifted(high)
    low = jax.lax.bitcast_convert_type(difference.astype(jnp.uint16), jnp.int16)
    return jnp.where(jnp.isnan(wide), jnp.int16(0), low)


def _join(high: BFloat16[Array, "..."], low: Int16[Array, "..."]) -> Float32[Array, "..."]:
    offset = jax.lax.bitcast_convert_type(low.astype(jnp.int32), jnp.uint32)
    return jax.lax.bitcast_convert_type(_shifted(high) + offset, jnp.float32)


def _shifted(high: BFloat16[Array, "..."]) -> Array:
    return jax.lax.bitcast_convert_type(high, jnp.uint16).astype(jnp.uint32) << 16
