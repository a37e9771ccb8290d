"""The random keys of a run."""

from __future__ import annotations

import zlib
from typing import Literal

import jax
from jaxtyping import Array

Purpose = Literal["steps", "tasks", "samples", "rounds"]


def run_key(seed: int, purpose: Purpose) -> Array:
    """The key that everything random of one kind comes from.

    A word is folded in first, since `fold_in(key, n)` of a step, a task and a written sample would otherwise be the
    same key wherever their numbers agree, and `split(key, n)[i]` equals `fold_in(key, i)`. Initial params are drawn
    from `jax.random.key(seed)`.

    Args:
      seed: the run's seed.
      purpose: `steps`: dropout and what methods draw in a step; `tasks`: what they draw before and after a task;
        `samples`: samples that a model writes; `rounds`: noise on what the clients of a round sent.
    """
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
