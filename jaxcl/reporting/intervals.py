"""Intervals of means over a few seeds, and of differences between runs of the same seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean with its confidence interval.

    Attributes:
      mean: the mean; `None` without values.
      margin: half the width of the interval; `None` for fewer than two values.
      size: number of values.
    """

    mean: float | None
    margin: float | None
    size: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.mean is not None and self.margin is not None and abs(self.mean) > self.margin


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and Student's t interval, for values from independent seeds that are about normally distributed.

    Args:
      values: one per seed.
      level: share of such intervals that contain the mean over all seeds.

    >>> interval = mean_interval([1.0, 2.0, 3.0])
    >>> interval.mean, round(interval.margin, 3)
    (2.0, 2.484)
    >>> mean_interval([5.0])
    Interval(mean=5.0, margin=None, size=1)
    """
    count = len(values)
    if count < 2:
        return Interval(float(values[0]) if count else None, None, count)
    spread = float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(float(np.mean(values)), float(stdtrit(count - 1, (1 + level) / 2)) * spread, count)


def paired_interval(first: Mapping[int, float], second: Mapping[int, float], level: float = LEVEL) -> Interval:
    """Interval of the mean of `first - second` over the seeds that both have.

    Differences within a seed cancel what its order of examples does to both.

    Args:
      first: values by seed.
      second: values by seed.
      level: see `mean_interval`.

    >>> paired_interval({0: 3.0, 1: 5.0, 2: 9.0}, {0: 1.0, 1: 3.0})
    Interval(mean=2.0, margin=0.0, size=2)
    """
    return mean_interval([first[seed] - second[seed] for seed in first if seed in second], level)
