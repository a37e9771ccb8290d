"""Most of these tests look at what the compiler makes of the model."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def optimisation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles with all optimisations, except in modules that set `UNOPTIMISED`."""
    jax.config.update("jax_disable_most_optimizations", getattr(request.module, "UNOPTIMISED", False))
    yield
    jax.config.update("jax_disable_most_optimizations", False)
