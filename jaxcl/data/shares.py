"""Exact shares: which of several sources each place of a sequence belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


class Shares:
    """Divides a sequence of places among sources, evenly and in fixed shares.

    How many of the first n places belong to a source is a closed formula, so that any place can be looked up alone. The
    first source gets `n s_0`, rounded; the second its share of the others, rounded; and so on. Each count therefore
    differs from `n s_i` by less than the number of sources, for every n.

    Attributes:
      shares: share of each source; they sum to 1.

    >>> shares = Shares([0.7, 0.3])
    >>> shares.before(10), shares.before(5)
    ([7, 3], [4, 1])
    """

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
        """Scales the weights.

        Args:
          weights: of the sources, all above 0.
        """
        exact = [exactly(weight) for weight in weights]
        if not exact or min(exact) <= 0:
            raise ValueError(f"weights: expected numbers above 0, got {list(weights)}")
        total = sum(exact)
        self.shares = [weight / total for weight in exact]
        # Share of a source among itself and the ones that follow.
        self._among = [share / sum(self.shares[index:]) for index, share in enumerate(self.shares)]

    def before(self, place: int) -> list[int]:
        """How many of the places 0 to `place - 1` belong to each source."""
        found = []
        for among in self._among[:-1]:
            found.append((2 * place * among.numerator + among.denominator) // (2 * among.denominator))
            place -= found[-1]
        return [*found, place]

    def at(self, place: int) -> tuple[int, int]:
        """The source of a place, and how many places before it belong to that source."""
        before, after = self.before(place), self.before(place + 1)
        return next((index, old) for index, (old, new) in enumerate(zip(before, after, strict=True)) if new > old)


def exactly(weight: float | Fraction) -> Fraction:
    """A weight as it is written: 0.1 is one tenth.

    >>> exactly(0.1)
    Fraction(1, 10)
    """
    return weight if isinstance(weight, Fraction) else Fraction(str(weight))


__all__ = ["Shares", "exactly"]
