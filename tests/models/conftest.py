"""Compiling takes most of these tests' time, and most of that goes into optimising programs that run once."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def optimisation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles without most optimisations in modules that set `UNOPTIMISED`."""
    jax.config.update("jax_disable_most_optimizations", getattr(request.module, "UNOPTIMISED", False))
    yield
    jax.config.update("jax_disable_most_optimizations", False)
