"""Keeps the lowest layers and the embeddings as they are (Zheng et al., 2025, arXiv 2501.13453), under any method."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree


def moving(axes: PyTree, shapes: PyTree, *, layers: int, embeddings: bool) -> PyTree:
    """1 for what moves and 0 for what is frozen, in shapes that broadcast to the params.

    Args:
      axes: names of each param's axes, as a tuple; params of layers have `layers` first.
      shapes: the params' shapes, the same tree.
      layers: number of lowest layers that are frozen.
      embeddings: whether params with a `vocab` axis are frozen: embeddings and output heads.

    Examples:
      >>> axes = {"embed": ("vocab", "embed"), "up": ("layers", "embed")}
      >>> found = moving(axes, {"embed": jnp.ones((5, 2)), "up": jnp.ones((3, 2))}, layers=2, embeddings=True)
      >>> found["embed"].tolist(), found["up"].tolist()
      (0.0, [[0.0], [0.0], [1.0]])
    """

    def one(shape: Any, names: tuple[str | None, ...]) -> jax.Array:
        if names and names[0] == "layers":
            rises = jnp.arange(shape.shape[0]) >= layers
            return rises.astype(jnp.float32).reshape(-1, *[1] * (len(shape.shape) - 1))
        return jnp.float32(not (embeddings and "vocab" in names))

    return jax.tree.map(one, shapes, axes)


def freezing(optimizer: optax.GradientTransformation, moves: PyTree) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose updates are multiplied by what `moving` gave."""
    inner = optax.with_extra_args_support(optimizer)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> tuple[PyTree, PyTree]:
        updates, state = inner.update(updates, state, params, **extra)
        return jax.tree.map(lambda update, moves: update * moves, updates, moves), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
