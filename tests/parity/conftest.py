"""Numbers are held against other libraries as jaxcl computes them for its users."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def optimisation() -> None:
    jax.config.update("jax_disable_most_optimizations", False)
