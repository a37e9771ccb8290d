"""The product of experts: each group of rows with a kernel of its own."""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from jaxcl.models.product import PRODUCT

_SCOPE = "grouped_product"  # by which `jaxcl plan` finds it


def grouped_product(
    x: Float[Array, "rows inputs"], kernels: Float[Array, "groups inputs outputs"], sizes: Int[Array, " groups"]
) -> Float[Array, "rows outputs"]:
    """`jax.lax.ragged_dot`, which can be differentiated under `jax.vmap`: example by example there.

    Args:
      x: sorted by group.
      kernels: of each group.
      sizes: rows of each group. What the product is in rows after the last group is not defined.

    Examples:
      >>> import jax.numpy as jnp
      >>> kernels = jnp.array([[[1.0]], [[10.0]]])
      >>> grouped_product(jnp.ones((3, 1)), kernels, jnp.array([1, 2])).tolist()
      [[1.0], [10.0], [10.0]]
    """
    return checkpoint_name(_product(x, kernels, sizes), PRODUCT)


# jax has no rule for rows in batches with kernels that have none. It is needed for the two passes only, not for what
# differentiation makes of them.
@sequential_vmap
@jax.named_scope(_SCOPE)
def _values(x: Array, kernels: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(x, kernels, sizes)


@sequential_vmap
@jax.named_scope(_SCOPE)
def _slopes(x: Array, kernels: Array, sizes: Array, dy: Array) -> tuple[Array, ...]:
    return jax.vjp(lambda x, kernels: jax.lax.ragged_dot(x, kernels, sizes), x, kernels)[1](dy)


@jax.custom_vjp
def _product(x: Array, kernels: Array, sizes: Array) -> Array:
    return _values(x, kernels, sizes)


def _forward(x: Array, kernels: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _values(x, kernels, sizes), (x, kernels, sizes)


def _backward(kept: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    dx, dkernels = _slopes(*kept, dy)
    return dx, dkernels, None


_product.defvjp(_forward, _backward)
