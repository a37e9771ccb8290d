"""Compiling takes most of these tests' time, and most of that goes into optimising programs that run once."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def without_optimisation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles without most optimisations, except in modules that set `OPTIMISED`: those compare bits."""
    jax.config.update("jax_disable_most_optimizations", not getattr(request.module, "OPTIMISED", False))
    yield
    jax.config.update("jax_disable_most_optimizations", False)
