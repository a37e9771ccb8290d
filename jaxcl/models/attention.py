"""Attention, and which kernel computes it.

Axis letters: b batch, q query position, s key position, k key/value heads, g query heads per key/value head,
d head_dim.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcl.models.blocked_attention import Pairs, blocked_attention
from jaxcl.models.compute import Kernel
from jaxcl.models.mask import HIDDEN, Window, capped, kernel_mask

Probabilities = Float[Array, "batch heads query length"]


def attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    *,
    segments: Int[Array, "batch length"],
    causal: bool,
    scale: float,
    kernel: Kernel,
    packed: bool = True,
    window: int | None = None,
    windowed: Bool[Array, ""] | None = None,
    cap: float | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Softmax attention within segments.

    Position q attends to k if both are of the same non-zero segment, and `k <= q` if causal. What comes out at
    padding (segment 0) is finite and otherwise unspecified.

    Args:
      query: queries; `heads` is a multiple of `kv_heads`, head h reads key/value head `h // (heads / kv_heads)`.
      key: keys.
      value: values.
      segments: 1-based document numbers, 0 for padding, int32.
      causal: whether later positions are hidden.
      scale: factor on the products of queries and keys.
      kernel: which implementation; `auto` takes the fastest of the platform that is traced for.
      packed: `False` promises that each row is one segment followed by padding, which saves most of the masking.
      window: position q attends to k only if they are less than this many tokens apart. Static: kernels leave out
        what is further away.
      windowed: whether the window is to be used; `None`: it is. Layers of a scan differ by it, so that a program
        holds each kind of attention once.
      cap: soft cap of the scaled products, see `capped`.

    Returns:
      Attended values, dtype of `query`. Softmax is computed in float32.
    """

    def run(window: int | None) -> Array:
        return _run(query, key, value, segments, Pairs(causal, scale, packed, window, cap), choose_kernel(kernel))

    if window is None or window >= query.shape[1]:
        return run(None)
    own, whole = (in_window(functools.partial(run, one), one) for one in (window, None))
    return own() if windowed is None else jax.lax.cond(windowed, own, whole)


def in_window(function: Callable[..., Array], window: int | None) -> Callable[..., Array]:
    """`function` under a name that says what it attends to, by which `jaxcl plan` finds it in the compiled program."""
    return jax.named_scope(f"window_{window}".lower())(function)


def _run(query: Array, key: Array, value: Array, segments: Array, pairs: Pairs, kernel: Kernel) -> Array:
    if kernel == "splash":
        from jaxcl.models.splash import splash_attention

        return splash_attention(query, key, value, segments=segments, **pairs._asdict())
    if kernel == "cudnn":
        reason = _cudnn_refusal(query, pairs)
        if reason is None:
            return _cudnn_attention(query, key, value, segments, pairs)
        warn_once(f"attention: cudnn cannot take this call, using xla instead: {reason}")
    return blocked_attention(query, key, value, segments=segments, **pairs._asdict())


def choose_kernel(kernel: Kernel, platform: str | None = None) -> Kernel:
    """The kernel that `auto` stands for on `platform` (default: where jax runs now); others stay.

    Examples:
      >>> choose_kernel("auto", "tpu"), choose_kernel("auto", "cpu"), choose_kernel("splash", "cpu")
      ('splash', 'xla', 'splash')
    """
    if kernel != "auto":
        return kernel
    by_platform: dict[str, Kernel] = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}
    return by_platform.get(platform or jax.default_backend(), "xla")


def explicit_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    *,
    segments: Int[Array, "batch length"],
    causal: bool,
    scale: float,
    packed: bool = True,
    window: Window = None,
    cap: float | None = None,
    relative: Float[Array, "batch heads length length"] | None = None,
    transform: Callable[[Probabilities], Probabilities] | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """`attention` with the probabilities as an array, which `transform` may look at and change.

    Args:
      query: as in `attention`.
      key: as in `attention`.
      value: as in `attention`.
      segments: as in `attention`.
      causal: as in `attention`.
      scale: as in `attention`.
      packed: as in `attention`.
      window: as in `attention`; it may be traced.
      cap: as in `attention`.
      relative: added to the products of queries and keys before they are scaled, float32.
      transform: from probabilities `[batch, heads, length, length]` float32 to the same; rows of padding hold
        something finite.

    Returns:
      Attended values, dtype of `query`.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32)
    if relative is not None:
        scores = scores + relative.reshape(scores.shape)
    scores = scores * scale
    scores = jnp.where(kernel_mask(segments, causal, packed, window=window), capped(scores, cap), HIDDEN)
    probs = jax.nn.softmax(scores, axis=-1)
    if transform is not None:
        probs = transform(probs.reshape(batch, heads, length, length)).reshape(probs.shape)
    out = jnp.einsum("bkgqs,bskd->bqkgd", probs.astype(value.dtype), value)
    return out.reshape(query.shape).astype(query.dtype)


def _cudnn_refusal(query: Array, pairs: Pairs) -> str | None:
    """Why cuDNN cannot take these queries, or `None`."""
    if pairs.cap is not None:
        return "it has no soft cap"
    head_dim, length = query.shape[-1], query.shape[1]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not {query.dtype}; set compute.dtype to bfloat16"
    if head_dim % 8 or head_dim > 128:
        return f"head_dim must be a multiple of 8 up to 128, not {head_dim}"
    if length % 2:
        return f"length must be even, not {length}"
    return None


def _cudnn_attention(query: Array, key: Array, value: Array, segments: Array, pairs: Pairs) -> Array:
    causal, scale, packed, window, _ = pairs
    if packed or (window is not None and not causal):
        # With several documents in a row the mask has to be spelled out; it broadcasts over heads.
        mask = kernel_mask(segments, causal, packed, window=window)[:, 0]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, implementation="cudnn")
    # A row of padding only keeps one token, so that no softmax is empty.
    lengths = jnp.maximum(jnp.sum(segments != 0, axis=1, dtype=jnp.int32), 1)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        is_causal=causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


@functools.cache
def warn_once(message: str) -> None:
    """Warns the first time it is called with `message`."""
    warnings.warn(message, stacklevel=2)
