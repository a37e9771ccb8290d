"""Contrast of what the model knew with what it learns (DAS, section 3.2, equations 6 and 7)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def pool(
    states: Float[Array, "batch length embed"], segments: Int[Array, "batch length"]
) -> Float[Array, "batch embed"]:
    """Mean of each row's `states` over its real tokens (`segments` not 0), float32; 0 for rows that are all padding.

    The authors' code averages over padding too.
    """
    real = (segments != 0).astype(jnp.float32)
    total = jnp.einsum("ble,bl->be", states.astype(jnp.float32), real)
    return total / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1.0)


def contrast(
    anchor: Float[Array, "batch embed"],
    positive: Float[Array, "batch embed"],
    past: Float[Array, "batch embed"],
    real: Bool[Array, " batch"],
    temperature: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Contrastive loss over the whole batch.

    $-\log \frac{e^{s(a_n, p_n) / \tau}}{\sum_j (e^{s(a_n, p_j) / \tau} + e^{s(a_n, q_j) / \tau})}$ summed over the
    real rows n, with j over the real rows, cosine similarity s, anchors a, positives p and past knowledge q.

    Under jit the batch is the global one, however it is split over devices and hosts. With `training.accumulate` it is
    one of k micro-batches: of B rows in all, an anchor is compared with 2B/k and not with 2B, which is an easier task
    (its value at chance is log(2B/k)). To see all of them, every micro-batch would need a second forward pass.

    Args:
      anchor: pooled output of the full network.
      positive: pooled output for the same input under other dropout.
      past: pooled output of the network with its gates set to the accumulated importance.
      real: which rows count; the others are neither anchors nor negatives.
      temperature: the paper takes 0.05.

    Returns:
      Sum of the losses in nats, and number of real rows.
    """
    anchor, positive, past = (_unit(x) for x in (anchor, positive, past))
    others = jnp.concatenate([positive, past])
    scores = jnp.einsum("ne,je->nj", anchor, others) / temperature
    scores = jnp.where(jnp.tile(real, 2), scores, -jnp.inf)
    own = jnp.sum(anchor * positive, axis=-1) / temperature
    # Without any real row, a padding row would see nothing at all.
    total = jax.nn.logsumexp(jnp.where(jnp.any(real), scores, 0.0), axis=-1)
    return jnp.sum(jnp.where(real, total - own, 0.0)), jnp.sum(real.astype(jnp.float32))


def _unit(x: Float[Array, "batch embed"]) -> Float[Array, "batch embed"]:
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
