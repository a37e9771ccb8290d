"""Params for tests, drawn with numpy: compiling `Network.init` takes longer than the tests."""

import functools
from typing import Any

import jax
import numpy as np

from jaxcl.models.network import Network


@functools.cache
def random_params(network: Network, seed: int) -> Any:
    """Normal weights of standard deviation 0.2, scales of norms 1."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "scale":
            return jax.numpy.ones(leaf.shape, leaf.dtype)
        return jax.numpy.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, network.shapes())
