"""Losses as sums and counts, so that splitting a batch changes no number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Array, Float


class Term(NamedTuple):
    """One addend of a loss, `weight * sum / count`.

    Sum and count stay apart until the whole batch has been seen: accumulation over uneven parts is then exact.

    Attributes:
      sum: over what the term is a mean of (tokens, examples), float32.
      count: how many of them; 0 turns the term off.
      weight: its factor in the loss, a constant to the gradient.
    """

    sum: Float[Array, ""]
    count: Float[Array, ""]  # type: ignore[assignment]  # nobody counts occurrences in a term
    weight: float | Float[Array, ""] = 1.0


Terms = Mapping[str, Term]
"""The terms of a loss by name; the loss is the sum of `weight * sum / count`."""
