"""Soft tokens: trained vectors that a prompt may begin with (prompt tuning, Lester et al. 2021, arXiv 2104.08691).

In token rows they are negative ids, soft token `j` is `-1 - j`, so that batches, packing, masks and generation need not
know of them; only the embedding does. No model generates one. Where a network has soft tokens, training changes nothing
else (except adapters, if it has any).
"""

from __future__ import annotations

from typing import TypeVar

import jax
from jaxtyping import Array

from jaxcl.models.trainable import SOFT_TOKENS, Params

Ids = TypeVar("Ids", int, Array)


def soft_id(index: Ids) -> Ids:
    """The token id of a soft token; its own inverse.

    >>> soft_id(0), soft_id(4), soft_id(-5)
    (-1, -5, 4)
    """
    return -1 - index


def is_soft(path: str) -> bool:
    """Whether a param's path is that of the soft tokens."""
    return path.startswith(f"{SOFT_TOKENS}/")


def start_from_words(params: Params, key: Array) -> Params:
    """Soft tokens as the vectors of different words, drawn at random (section 3.2: better than noise). Pure.

    Args:
      params: of a whole network with soft tokens.
      key: to draw from.

    Returns:
      The changed leaf alone, for `jaxcl.models.trainable.overlay`.
    """
    words, soft = params["embed"]["embedding"], params[SOFT_TOKENS]["embedding"]
    chosen = jax.random.choice(key, len(words), (len(soft),), replace=False)
    return {SOFT_TOKENS: {"embedding": words[chosen].astype(soft.dtype)}}
