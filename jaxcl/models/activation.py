"""The activations of feed-forward units, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
from jaxtyping import Array

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
