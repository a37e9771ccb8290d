"""The matrix product that every layer is made of, with a backward pass that spares copies."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from jaxcl.models.compute import Remat

PRODUCT = "product"
"""Name under which a rematerialisation policy can keep the results."""

_COUNTED: contextvars.ContextVar[Array | None] = contextvars.ContextVar("counted", default=None)


@contextlib.contextmanager
def input_squares(counted: Bool[Array, "..."]) -> Iterator[None]:
    r"""In place of its gradient, the kernel of a product in the body gets the sum of its squared inputs.

    That is $\sum_t x_{ti}^2$ for input $i$, the same for all outputs, over the rows $t$ that count. Other gradients are
    as always. The forward pass is what has to be in the body. It has to be traced there, so a function that was
    compiled before does not see it.

    Args:
      counted: which rows count, `[*rows]`; products with other axes of rows count all of them.
    """
    token = _COUNTED.set(counted)
    try:
        yield
    finally:
        _COUNTED.reset(token)


def rematerialised(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`body` of a scan over layers, recomputed in the backward pass as `Compute.remat` says."""
    if remat == "none":
        return body
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    }
    # Within a scan the compiler cannot merge the two computations anyway.
    return jax.checkpoint(body, policy=policies[remat], prevent_cse=False)


def product(x: Float[Array, "..."], kernel: Float[Array, "..."], contracted: int, dtype: Any = None) -> Array:
    """Sums over the last `contracted` dimensions of `x` and the first of `kernel`.

    Values and gradients are those of `jnp.tensordot`. Its backward pass differs in what a compiler makes of it: the
    gradient of the kernel sums over all rows, for which one factor has to be read across its rows. XLA on CPUs
    writes a transposed copy of that factor, whichever comes to hand, and computes what it consists of a second
    time while doing so. Here it is the narrower factor, and both are finished arrays (`benchmarks/train_step.py`:
    a fifth of the step).

    Args:
      x: `[*rows, *inputs]`.
      kernel: `[*inputs, *outputs]`, same dtype.
      contracted: number of dimensions in `inputs`. Static.
      dtype: of sums and result; `None` for that of `x`. Static.

    Returns:
      `[*rows, *outputs]`.

    Examples:
      >>> product(jnp.ones((2, 3)), jnp.ones((3, 4)), 1).shape
      (2, 4)
    """
    return checkpoint_name(_product(x, kernel, _COUNTED.get(), contracted, dtype), PRODUCT)


_Kept = tuple[Array, Array, Array | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x: Array, kernel: Array, counted: Array | None, contracted: int, dtype: Any) -> Array:
    return jnp.tensordot(x, kernel, axes=contracted, preferred_element_type=dtype)


def _forward(x: Array, kernel: Array, counted: Array | None, contracted: int, dtype: Any) -> tuple[Array, _Kept]:
    return _product(x, kernel, counted, contracted, dtype), (x, kernel, counted)


def _backward(contracted: int, dtype: Any, kept: _Kept, cotangent: Array) -> tuple[Array, Array, None]:
    (x, kernel, counted), dy = kept, cotangent.astype(kept[0].dtype)
    x, dy = _finished(x, dy)
    rows, outputs = x.ndim - contracted, kernel.ndim - contracted
    dx = jax.lax.dot_general(dy, kernel, ((range(rows, dy.ndim), range(contracted, kernel.ndim)), ((), ())))
    if counted is not None:
        return dx, _summed_squares(x, kernel, counted, contracted), None
    over = ((range(rows), range(rows)), ((), ()))
    if math.prod(x.shape[rows:]) <= math.prod(dy.shape[rows:]):
        return dx, jax.lax.dot_general(x, dy, over), None
    # Finished, or the compiler would turn this into the product above.
    (transposed,) = _finished(jax.lax.dot_general(dy, x, over))
    return dx, jnp.moveaxis(transposed, range(outputs), range(contracted, kernel.ndim)), None


def _summed_squares(x: Array, kernel: Array, counted: Array, contracted: int) -> Array:
    """See `input_squares`; in the shape and dtype of `kernel`, as a gradient has to be."""
    rows, outputs = x.ndim - contracted, kernel.ndim - contracted
    squares = jnp.square(x.astype(jnp.float32))
    if counted.shape == x.shape[:rows]:
        squares = jnp.where(counted.reshape(*counted.shape, *[1] * contracted), squares, 0.0)
    sums = jnp.sum(squares, axis=tuple(range(rows)))
    return jnp.broadcast_to(sums.reshape(*sums.shape, *[1] * outputs), kernel.shape).astype(kernel.dtype)


def _finished(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, which XLA then does not compute anew inside of what reads them. Only on CPUs: others do it well."""
    return jax.lax.platform_dependent(*arrays, cpu=lambda *x: jax.lax.optimization_barrier(x), default=lambda *x: x)


_product.defvjp(_forward, _backward)
