"""Compilation with the run's shardings, and the cache of compiled programs on disk."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxcl.errors import UserError
from jaxcl.models.axes import constraints
from jaxcl.sharding.layout import Layout, put
from jaxcl.sharding.rules import Activations

PyTree = Any


class Compiler:
    """`jax.jit` for functions of a run's params; the same function is compiled once, however often it is asked for."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles a pure function; serves as `Task.compile`.

        Args:
          function: takes and returns pytrees of arrays. A bound method or a function of a module is compiled once
            for all tasks; a lambda or local function anew each time.

        Returns:
          The compiled function. Results that mirror the params are sharded like them, all else is whole on every
          device, so that every process may read it.
        """

        def constrained(*args: Any, **kwargs: Any) -> Any:
            out = function(*args, **kwargs)
            return jax.lax.with_sharding_constraint(out, self.layout.like_params(out))

        return self._once(function, "whole", lambda: self._at_home(jax.jit(self.trace(constrained, function))))

    def per_row(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles a pure function whose results all have a leading batch axis, split like a batch."""
        shardings = self.layout.batch
        return self._once(
            function, "per row", lambda: self._at_home(jax.jit(self.trace(function), out_shardings=shardings))
        )

    def trace(self, function: Callable[..., Any], name_of: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """`function`, with logical axis names meaning this run's mesh while it is traced; not compiled.

        Args:
          function: a pure function.
          name_of: the function that the program is named after, if it is not `function`.
        """

        @functools.wraps(name_of or function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            with self.meaning():
                return function(*args, **kwargs)

        return traced

    def meaning(self) -> contextlib.AbstractContextManager[None]:
        """The context in which activations are constrained; empty on one device."""
        mesh = self.layout.mesh
        return constraints(Activations(mesh)) if mesh.size > 1 else contextlib.nullcontext()

    def _at_home(self, jitted: Callable[..., Any]) -> Callable[..., Any]:
        """Puts arguments that live nowhere in particular on all devices before the call.

        A loop like `sums = add(sums, batch)` would else compile twice: for the fresh `sums`, and for those it returned.
        """

        def home(leaf: Any) -> Any:
            placed = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)
            return leaf if placed else put(leaf, self.layout.replicated)

        @functools.wraps(jitted)
        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = jax.tree.map(home, (args, kwargs))
            return jitted(*args, **kwargs)

        return call

    def _once(self, function: Callable[..., Any], use: str, build: Callable[[], Callable[..., Any]]) -> Any:
        # A local function may hold arrays in its closure, which remembering it would keep alive.
        if not (inspect.ismethod(function) or "<locals>" not in getattr(function, "__qualname__", "<locals>")):
            return build()
        if (function, use) not in self._compiled:
            self._compiled[function, use] = build()
        return self._compiled[function, use]


def enable_compilation_cache(folder: str | os.PathLike[str] | None) -> None:
    """Keeps compiled programs on disk, so that a second start of the same run compiles nothing.

    Args:
      folder: where; created if absent. `None` leaves jax as it is (it reads `JAX_COMPILATION_CACHE_DIR` by itself).

    Raises:
      UserError: the folder cannot be created.
    """
    if folder is None:
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"compilation cache {path}: cannot be created: {error.strerror}") from error
    jax.config.update("jax_compilation_cache_dir", str(path))
    # The default keeps only what took a second: the many small programs between tasks add up to more.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
