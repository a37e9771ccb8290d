"""Params that are not numbers are refused, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxcl.errors import UserError
from jaxcl.weights.tree import flatten


def refuse_not_finite(params: Mapping[str, Any], where: str) -> None:
    """Checks params that are on devices.

    Args:
      params: a (nested) dict of arrays.
      where: what they belong to, for the message.

    Raises:
      UserError: a param holds NaN or infinite values; the message names it.
    """
    # One at a time, because params may be on different devices.
    for path, leaf in flatten(params).items():
        if not _all_finite(leaf):
            raise not_finite(where, path, str(leaf.dtype))


@jax.jit
def _all_finite(leaf: Array) -> Array:
    return jnp.isfinite(leaf).all()


def not_finite(where: str, name: str, dtype: str) -> UserError:
    """The error for a tensor with values that are not finite when read as `dtype`."""
    return UserError(f"{where}: the tensor {name} holds NaN or infinite values (read as {dtype}); the model is damaged")
