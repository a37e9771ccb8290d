"""A weight that keeps one term of a loss in a fixed proportion to the others."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

_DECAY = 0.9


class Balance(NamedTuple):
    """Running means of a term and of what it is weighed against.

    Attributes:
      term: sum of the term's values, each weighted by 0.1 * 0.9^(values since).
      rest: that of the other terms of the loss.
    """

    term: Float[Array, ""]
    rest: Float[Array, ""]

    @classmethod
    def zero(cls) -> Balance:
        """Nothing seen yet."""
        return cls(jnp.float32(0), jnp.float32(0))

    def add(self, term: Float[Array, ""], rest: Float[Array, ""]) -> Balance:
        """Takes in the values of a step; one where the term is 0 or not finite says nothing and changes nothing.

        Args:
          term: the term's value.
          rest: that of the other terms.
        """
        known = (term > 0) & jnp.isfinite(term) & jnp.isfinite(rest)

        def mean(before: Array, now: Array) -> Array:
            return jnp.where(known, _DECAY * before + (1 - _DECAY) * now, before)

        return Balance(mean(self.term, term), mean(self.rest, rest))

    def weight(self, share: float, limit: float) -> Float[Array, ""]:
        """The factor that makes the term `share` times the rest, at most `limit`; 0 before anything was seen.

        The divergence from a fixed teacher is quadratic in how far a model has moved, so a fixed weight belongs to one
        learning rate; this one does not. The means are constants to the gradient.

        Args:
          share: wanted ratio of the weighted term to the rest.
          limit: largest weight, for a term that is nearly 0.

        Examples:
          >>> Balance.zero().add(jnp.float32(0.01), jnp.float32(2.0)).weight(0.5, 1000.0).item()
          100.0
        """
        ratio = share * self.rest / jnp.where(self.term > 0, self.term, 1.0)
        return jnp.where(self.term > 0, jnp.minimum(ratio, limit), 0.0)
