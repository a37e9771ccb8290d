"""How much of a run's time went into steps that count."""

from __future__ import annotations

from collections.abc import Mapping

PRODUCTIVE = "training"
"""The part of a run's time that is steps; those that were made again after an interruption are in `lost`."""


def goodput(seconds: Mapping[str, float]) -> float | None:
    """Share of the time that went into steps that count, from 0 to 1; `None` if no time was measured.

    Args:
      seconds: by part, as in `Results.timing`.

    Examples:
      >>> goodput({"training": 90.0, "compiling": 6.0, "lost": 4.0})
      0.9
    """
    total = sum(seconds.values())
    return seconds.get(PRODUCTIVE, 0.0) / total if total > 0 else None
