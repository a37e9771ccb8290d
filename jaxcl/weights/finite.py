"""Params that are not numbers are refused, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

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
    flat = flatten(params)
    found = jax.device_get(jax.jit(lambda flat: {path: jnp.isfinite(leaf).all() for path, leaf in flat.items()})(flat))
    for path, leaf in flat.items():
        if not found[path]:
            raise not_finite(where, path, str(leaf.dtype))


def not_finite(where: str, name: str, dtype: str) -> UserError:
    """The error for a tensor with values that are not finite when read as `dtype`."""
    return UserError(f"{where}: the tensor {name} holds NaN or infinite values (read as {dtype}); the model is damaged")
