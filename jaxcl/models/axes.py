"""Where model code names the logical axes of its activations; what the names mean is decided outside.

Model code knows no mesh. It calls `constrain` at layer boundaries and `per_shard` around kernels that the compiler
cannot partition by itself. Both do nothing unless a caller is inside `constraints(...)` while it traces.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax

Names = tuple[str | None, ...]


class Constraints(Protocol):
    """What gives logical axis names their meaning; `jaxcl.sharding` has the one for meshes."""

    def constrain(self, x: jax.Array, names: Names) -> jax.Array:
        """`x` with its layout constrained to `names`."""
        ...

    def shards(self, name: str) -> int:
        """Over how many shards the logical axis `name` is split."""
        ...

    def per_shard(self, function: Callable[..., Any], inputs: Sequence[Names], output: Names) -> Callable[..., Any]:
        """`function`, run on each device's own shards of its arguments (`jax.shard_map`)."""
        ...


_active: contextvars.ContextVar[Constraints | None] = contextvars.ContextVar("constraints", default=None)


@contextlib.contextmanager
def constraints(meaning: Constraints) -> Iterator[None]:
    """Gives axis names their meaning for everything traced within.

    Examples:
      >>> import jax.numpy as jnp
      >>> class Print:
      ...     def constrain(self, x, names):
      ...         print(x.shape, names)
      ...         return x
      >>> with constraints(Print()):
      ...     _ = constrain(jnp.zeros((2, 3)), "batch", "length")
      (2, 3) ('batch', 'length')
    """
    token = _active.set(meaning)
    try:
        yield
    finally:
        _active.reset(token)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Says which logical axes the dimensions of `x` are; the identity outside `constraints`.

    Raises:
      ValueError: the number of names is not the number of dimensions.
    """
    if len(names) != x.ndim:
        raise ValueError(f"constrain: expected {x.ndim} axis names for shape {x.shape}, got {names}")
    meaning = _active.get()
    return x if meaning is None else meaning.constrain(x, names)


def shards(name: str) -> int:
    """Over how many shards the logical axis `name` is split; 1 outside `constraints`."""
    meaning = _active.get()
    return 1 if meaning is None else meaning.shards(name)


def per_shard(function: Callable[..., Any], inputs: Sequence[Names], output: Names) -> Callable[..., Any]:
    """`function`, run on each device's shards of its arguments; `function` itself outside `constraints`."""
    meaning = _active.get()
    return function if meaning is None else meaning.per_shard(function, inputs, output)
