"""Which setting of each method a sweep chooses, and what it costs in learning to keep more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxcl.reporting.intervals import Interval, mean_interval, paired_interval
from jaxcl.reporting.page import number
from jaxcl.reporting.run_data import directions, scores

ChosenBy = Literal["dev", "test", "nothing"]
#: Measures of a setting: field, heading, whether it is a change, which has a sign and no direction.
MEASURES: tuple[tuple[str, str, bool], ...] = (
    ("op", "Final mean", False),
    ("bwt", "BWT", True),
    ("learned", "Learned", False),
    ("anytime", "Anytime", False),
)


class Point(NamedTuple):
    """A method with one setting.

    Attributes:
      method: its name.
      setting: what is special about it, in words; empty if nothing was swept for this method.
      rows: one per seed, as `measured` completes them.
      chosen: whether the sweep chooses it.
    """

    method: str
    setting: str
    rows: Sequence[Mapping[str, Any]]
    chosen: bool = False

    def values(self, name: str) -> dict[int, float]:
        """A measure by seed, where it was measured."""
        return {row["seed"]: row[name] for row in self.rows if row[name] is not None}

    def interval(self, name: str) -> Interval:
        """Mean of a measure over the seeds."""
        return mean_interval([*self.values(name).values()])


def measured(result: Mapping[str, Any]) -> dict[str, float | None]:
    """What results amount to on the frontier.

    Args:
      result: content of `results.json`.

    Returns:
      `learned`: mean score right after each task; `anytime`: mean over the moments after each task of the mean score
      of the tasks learned by then; `dev`: mean score on the dev rows at the end. `None` where it was not measured.
    """
    matrix = scores(dict(result))
    dev = result.get("dev")
    return {
        "learned": None if result.get("joint") else _known(np.diagonal(matrix)),
        "anytime": None if result.get("joint") else _known([row[: at + 1].mean() for at, row in enumerate(matrix)]),
        "dev": None if not dev or None in dev else _known(dev),
    }


def choose(points: Sequence[Point], higher_is_better: Sequence[bool]) -> tuple[list[Point], dict[str, ChosenBy]]:
    """Marks one setting of each method: that with the best mean over seeds at the end.

    The dev rows decide where every run of the method was scored on them, else the scored rows themselves. A setting
    that lacks a seed which another one has is never chosen. Where some tasks' scores are better when larger and others'
    when smaller, no mean says anything, and the first setting is marked.

    Args:
      points: all settings.
      higher_is_better: direction of each task's score.

    Returns:
      The points, and by what each method's was chosen.
    """
    chosen: list[Point] = []
    by: dict[str, ChosenBy] = {}
    for method in dict.fromkeys(point.method for point in points):
        own = [point for point in points if point.method == method]
        seeds = max(len(point.rows) for point in own)
        whole = [point for point in own if len(point.rows) == seeds]
        by[method] = "dev" if all(len(point.values("dev")) == seeds for point in whole) else "test"
        name = {"dev": "dev", "test": "op"}[by[method]]
        known = [point for point in whole if len(point.values(name)) == seeds]
        if len(set(higher_is_better)) > 1 or not known:
            by[method], best = "nothing", whole[0]
        else:
            sign = 1 if higher_is_better[0] else -1
            best = max(known, key=lambda point: sign * _mean(point, name))
        chosen += [point._replace(chosen=point is best) for point in own]
    return chosen, by


def front(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """The settings of one method that no other one beats in both learning and retention, by learning.

    Args:
      points: settings of one method.
      higher_is_better: direction of the scores.
    """
    sign = 1 if higher_is_better else -1
    known = [point for point in points if point.values("learned") and point.values("bwt")]
    ranked = sorted(known, key=lambda point: (-sign * _mean(point, "learned"), -_mean(point, "bwt")))
    kept: list[Point] = []
    for point in ranked:
        if not kept or _mean(point, "bwt") > _mean(kept[-1], "bwt"):
            kept.append(point)
    return kept


def difference(point: Point, reference: Point, name: str, higher_is_better: bool) -> Interval:
    """How much better a setting is than another, paired over seeds.

    Args:
      point: a setting.
      reference: another one.
      name: the measure.
      higher_is_better: direction of the scores; a measure that is a change has its sign already.

    Returns:
      Positive where `point` is better.
    """
    change = {field: signed for field, _, signed in MEASURES}[name]
    first, second = point.values(name), reference.values(name)
    return paired_interval(first, second) if higher_is_better or change else paired_interval(second, first)


def words(interval: Interval, *, signed: bool = False, digits: int = 1) -> str:
    """Mean ± margin.

    >>> words(Interval(-1.25, 0.5, 3), signed=True), words(Interval(2.0, None, 1))
    ('−1.2 ± 0.5', '2.0')
    """
    margin = "" if interval.margin is None else f" ± {number(interval.margin, digits)}"
    return number(interval.mean, digits, signed=signed) + margin


def points_of(sweep: Mapping[str, Any]) -> list[Point]:
    """The points of a comparison's `sweep`."""
    return [Point(one["method"], one["setting"], one["runs"], one["chosen"]) for one in sweep["points"]]


def direction(content: Mapping[str, Any]) -> bool:
    """Whether a comparison's scores are better when larger."""
    return directions(dict(content))[0]


def _mean(point: Point, name: str) -> float:
    return float(np.mean([*point.values(name).values()]))


def _known(values: Any) -> float | None:
    array = np.asarray(values, float)
    return float(array.mean()) if array.size and np.isfinite(array).all() else None
