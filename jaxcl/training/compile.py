"""Compilation with the run's shardings, and the on-disk cache of compiled programs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxcl.errors import UserError
from jaxcl.models.axes import constraints
from jaxcl.sharding.layout import Layout, put
from jaxcl.sharding.rules import Activations


class Compiler:
    """`jax.jit` for functions of a run's params; each function is compiled only once."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles a pure function; this is `Task.compile`.

        Args:
          function: takes and returns pytrees of arrays. A bound method or a module-level function is compiled once
            for all tasks; a lambda or local function at every call of this.

        Returns:
          The compiled function. Results that mirror the params are sharded like them; everything else is replicated,
          so that every process can read it.
        """

        def constrained(*args: Any, **kwargs: Any) -> Any:
            out = function(*args, **kwargs)
            return jax.lax.with_sharding_constraint(out, self.layout.like_params(out))

        return self._once(
            function, "whole", lambda: self._replicated_inputs(jax.jit(self.trace(constrained, function)))
        )

    def per_row(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles a pure function whose results have a leading batch axis, which is sharded like a batch."""
        shardings = self.layout.batch
        return self._once(
            function, "per row", lambda: self._replicated_inputs(jax.jit(self.trace(function), out_shardings=shardings))
        )

    def trace(self, function: Callable[..., Any], name_of: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """`function`, with logical axis names mapped to this run's mesh while it is traced; not compiled.

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
        """The context that constrains activations to this run's mesh; does nothing on one device."""
        mesh = self.layout.mesh
        return constraints(Activations(mesh)) if mesh.size > 1 else contextlib.nullcontext()

    def _replicated_inputs(self, jitted: Callable[..., Any]) -> Callable[..., Any]:
        """Replicates arguments that have no mesh sharding yet, and brings those that wait on the host.

        A loop like `sums = add(sums, batch)` would otherwise compile twice: for the initial `sums` and for the
        returned ones.
        """

        def replicate(leaf: Any) -> Any:
            if not (isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)):
                return put(leaf, self.layout.replicated)
            waits = leaf.sharding.memory_kind == "pinned_host"
            return jax.device_put(leaf, leaf.sharding.with_memory_kind("device")) if waits else leaf

        @functools.wraps(jitted)
        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = jax.tree.map(replicate, (args, kwargs))
            return jitted(*args, **kwargs)

        return call

    def _once(self, function: Callable[..., Any], use: str, build: Callable[[], Callable[..., Any]]) -> Any:
        # A local function is not cached: arrays in its closure would never be freed.
        if not (inspect.ismethod(function) or "<locals>" not in getattr(function, "__qualname__", "<locals>")):
            return build()
        if (function, use) not in self._compiled:
            self._compiled[function, use] = build()
        return self._compiled[function, use]


def programs_folder() -> Path:
    """Where compiled programs are kept by default: in the user's cache folder, by processor and number of usable cores.

    What XLA makes for a CPU depends on both, but jax's cache does not ask for them. A program that was compiled for
    fewer cores rounds otherwise in the last bit. The first process of a run would load it where the others compile
    anew (their keys differ), and what should be the same in all of them would not be.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    about = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    digest = hashlib.sha256("\n".join([platform.processor(), *about]).encode()).hexdigest()[:12]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "jaxcl" / "programs" / f"{platform.machine()}-{digest}-{cores}"


def enable_compilation_cache(folder: str | os.PathLike[str] | None) -> None:
    """Keeps compiled programs on disk, so that a second start of the same run does not compile again.

    Args:
      folder: the cache; created if absent. `None` changes nothing (jax itself reads `JAX_COMPILATION_CACHE_DIR`).

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
    # The default keeps only what took a second to compile, but the many small programs between tasks add up.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
