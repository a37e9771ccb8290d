"""The part of a comparison's page about a sweep: the frontier, the chosen settings, and all settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from jaxcl.reporting.frontier import MEASURES, Point, difference, direction, front, points_of, words
from jaxcl.reporting.page import address, details, figure, section, table, text
from jaxcl.reporting.style import DASH, FAINT, grid, series_colour, series_dash, short, styled, svg

_HOW = {
    "dev": "by the mean score on the dev rows at the end",
    "test": "by the mean score at the end, on the scored rows themselves (some run has no dev scores), so that their "
    "scores are optimistic",
    "nothing": "without a comparison (scores of some tasks are better when larger, of others when smaller): the first "
    "setting",
}
_NOTE = (
    "± is half of a 95% interval of the mean over the seeds (Student's t). Learned: mean score right after each task. "
    "BWT: change of the earlier tasks since each was learned. Anytime: mean over the moments after each task of the "
    "mean over the tasks learned by then."
)


def sections(content: Mapping[str, Any]) -> list[str]:
    """The sections of a sweep; none without one.

    Args:
      content: the content of `comparison.json`.
    """
    if "sweep" not in content:
        return []
    sweep, points = content["sweep"], points_of(content["sweep"])
    methods = list(content["methods"])
    chosen = {point.method: point for point in points if point.chosen}
    kinds = dict.fromkeys(sweep["chosen_by"].values())
    names = {by: text(", ".join(name for name in methods if sweep["chosen_by"][name] == by)) for by in kinds}
    how = "; ".join(f"{names[by] if len(kinds) > 1 else ''} {_HOW[by]}".strip() for by in kinds)
    failed = "".join(f"<li>{text(title)}: {text(why)}</li>" for title, why in sweep["failed"].items())
    # With a single task nothing is kept, and joint training learns all at once.
    drawn = any(point.values("bwt") for point in points)
    return [
        section(
            "Learning and keeping",
            figure(frontier_plot(points, methods, higher_is_better=direction(content))) if drawn else "",
            _chosen(chosen),
            _differences(chosen, higher_is_better=direction(content)),
            note=f"Each dot is a setting; the line joins those that no other setting of the method beats in both. "
            f"Ringed: the chosen one. Up and right is better. Chosen {how}. {_NOTE}",
        ),
        section(
            "All settings",
            _all(points),
            f"<h3>Left out, because they failed</h3><ul>{failed}</ul>" if failed else "",
            _reports(points),
        ),
    ]


def frontier_plot(points: Sequence[Point], methods: Sequence[str], *, higher_is_better: bool) -> str:
    """Retention against learning, a line per method, as an SVG element.

    Args:
      points: all settings.
      methods: their names, in the order that decides colours.
      higher_is_better: direction of the scores; the axis of learning is turned so that right is better.
    """
    with styled("frontier"):
        drawing, (axis,) = grid(1, 1, height=4.2)
        for place, method in enumerate(methods):
            draw_method(axis, [point for point in points if point.method == method], place, higher_is_better)
        axis.set_xlabel("score right after each task, mean")
        axis.set_ylabel("change since (BWT)")
        if not higher_is_better:
            axis.invert_xaxis()
        axis.margins(0.08)
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return svg(drawing, "Retention against learning, by method")


def draw_method(axis: Axes, points: Sequence[Point], place: int, higher_is_better: bool) -> None:
    """Draws the settings of one method.

    Args:
      axis: where.
      points: its settings.
      place: decides the colour.
      higher_is_better: direction of the scores.
    """
    colour = series_colour(place)
    known = [point for point in points if point.values("learned") and point.values("bwt")]
    if not known:
        return
    where = {id(point): tuple(point.interval(name).mean or 0.0 for name in ("learned", "bwt")) for point in known}
    axis.plot(*zip(*where.values(), strict=True), "o", markersize=3.5, color=colour, alpha=0.45, linestyle="none")
    line = [where[id(point)] for point in front(known, higher_is_better)]
    axis.plot(*zip(*line, strict=True), color=colour, linestyle=series_dash(place), marker="o", markersize=3.5,
              label=short(points[0].method, 24))  # fmt: skip
    for point in known:
        if point.chosen:
            x, y = where[id(point)]
            margins = [point.interval(name).margin for name in ("learned", "bwt")]
            if None not in margins:
                axis.errorbar(x, y, xerr=margins[0], yerr=margins[1], color=colour, ecolor=FAINT, elinewidth=1.2)
            axis.plot(x, y, "o", markersize=10, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.8)


def _chosen(chosen: Mapping[str, Point]) -> str:
    heads = ["Method", "Chosen setting", "Seeds", *(title for _, title, _ in MEASURES)]
    rows = [
        [
            text(method),
            text(point.setting or DASH),
            str(len(point.rows)),
            *(words(point.interval(name), signed=signed) for name, _, signed in MEASURES),
        ]
        for method, point in chosen.items()
    ]
    return f"<h3>The chosen settings</h3>{table(heads, rows, numbers=range(2, len(heads)))}"


def _differences(chosen: Mapping[str, Point], *, higher_is_better: bool) -> str:
    reference, *others = chosen.values()
    if not others:
        return ""
    heads = ["Method", *(title for _, title, _ in MEASURES)]
    rows = []
    for point in others:
        cells = [text(point.method)]
        for name, _, _ in MEASURES:
            found = difference(point, reference, name, higher_is_better)
            cell = words(found, signed=True)
            cells.append(f"<b>{cell}</b>" if found.clear else cell)
        rows.append(cells)
    lead = (
        f"<h3>Better than {text(reference.method)} by</h3><p class=\"note\">Differences within each seed, each method "
        "with its chosen setting; positive is better. Bold: the interval excludes 0.</p>"
    )  # fmt: skip
    return lead + table(heads, rows, numbers=range(1, len(heads)))


def _all(points: Sequence[Point]) -> str:
    heads = ["Method", "Setting", "Seeds", *(title for _, title, _ in MEASURES), "Dev"]
    rows = []
    for point in points:
        cells = [words(point.interval(name), signed=signed) for name, _, signed in MEASURES]
        row = [text(point.method), text(point.setting or DASH), str(len(point.rows)), *cells]
        row.append(words(point.interval("dev")))
        rows.append([f"<b>{cell}</b>" for cell in row] if point.chosen else row)
    return table(heads, rows, numbers=range(2, len(heads)))


def _reports(points: Sequence[Point]) -> str:
    """Links to the reports of all runs."""
    links = [
        f'<li><a href="{address(row["folder"])}/report.html">{text(row["folder"])}</a></li>'
        for point in points
        for row in point.rows
    ]
    return details("Reports of all runs", f"<ul>{''.join(links)}</ul>", printed=False)
