"""Curves, bars and histograms of reports: functions of plain numbers that return an inline SVG element."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter

from jaxcl.reporting.page import number
from jaxcl.reporting.style import (
    FAINT,
    INK,
    MUTED,
    grid,
    outer_labels,
    panels,
    per_row,
    series_colour,
    series_dash,
    short,
    styled,
    svg,
)

_POINTS = 400  # largest number of points of a curve; more cannot be seen


def retention(tasks: Sequence[str], scores: Float[np.ndarray, "rows tasks"], unit: str) -> str:
    """A panel per task: its score after each task since it was learned (hollow: before).

    Args:
      tasks: names.
      scores: score on each task (column) after each task (row); NaN if not measured.
      unit: unit of the scores.
    """
    columns = per_row(len(tasks))
    rows = math.ceil(len(tasks) / columns)
    with styled("retention"):
        figure, axes = grid(columns, rows, height=1.75 if rows > 1 else 2.1, sharex=True, sharey=True)
        for index, axis in enumerate(axes):
            if index >= len(tasks):
                axis.set_visible(False)
                continue
            curve = scores[:, index]
            steps = np.arange(1, len(scores) + 1)
            for other in range(len(tasks)):
                thin = 1.0 if len(tasks) <= 6 else 0.5
                _line(axis, steps[other:], scores[other:, other], color=FAINT, linewidth=thin, zorder=1)
            _line(axis, steps[: index + 1], curve[: index + 1], color=series_colour(0), linewidth=1.1, linestyle=":")
            _line(axis, steps[index:], curve[index:], color=series_colour(0), marker="o", markersize=4, zorder=3)
            before = np.isfinite(curve[:index])
            axis.plot(steps[:index][before], curve[:index][before], "o", markersize=4, markerfacecolor="none",
                      markeredgecolor=series_colour(0))  # fmt: skip
            _end_title(axis, curve)
            axis.set_title(f"{index + 1} {short(tasks[index], 100 // columns - 9)}")
            _task_axis(axis, len(scores))
            axis.margins(x=0.12, y=0.16)
        outer_labels(axes, columns, len(tasks), "tasks learned", f"score{' in %' if unit == '%' else ''}")
        return svg(figure, "Score of each task after every task")


def loss(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], bounds: Sequence[tuple[float, str]],
         label: str, name: str, *, height: float = 2.6) -> str:  # fmt: skip
    """Curves over the steps of all tasks, with a line at the start of each task.

    Args:
      curves: steps and values by name.
      bounds: first step and name of each task.
      label: label of the vertical axis.
      name: name of the figure.
      height: height of the figure in inches.
    """
    with styled(name):
        figure, (axis,) = grid(1, 1, height=height)
        for colour, (title, (steps, values)) in enumerate(curves.items()):
            steps_seen, seen = thinned(np.asarray(steps, float), np.asarray(values, float))
            # A task with a single logged row has only a point, no line.
            dots: dict[str, Any] = {"marker": "o", "markersize": 3} if len(seen) <= 40 else {}
            axis.plot(steps_seen, seen, **dots, color=series_colour(colour), linewidth=1.4, label=short(title, 40))
        last = max((max(steps) for steps, _ in curves.values() if len(steps)), default=1.0)
        for index, (start, title) in enumerate(bounds):
            end = bounds[index + 1][0] if index + 1 < len(bounds) else last
            if index:
                axis.axvline(start, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
            room = int(max(end - start, 0) / max(last, 1) * 105)
            place = f"{index + 1} " if len(bounds) > 1 else ""
            text = f"{place}{short(title, room - 3)}" if room > 8 else place
            axis.text(
                start, 1.02, f" {text}", transform=axis.get_xaxis_transform(), color=MUTED, fontsize=8, va="bottom"
            )
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.set_xlim(0, max(last, 1))
        _log_if_wide(axis, [values for _, values in curves.values()])
        if len(curves) > 1:
            figure.legend(loc="outside lower right", ncols=min(len(curves), 4))
        return svg(figure, f"{label} over the steps of all tasks")


def small_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], starts: Sequence[float]) -> str:
    """A small panel per quantity, over the steps."""
    columns = min(3, len(curves))
    with styled("small curves"):
        figure, axes = grid(columns, math.ceil(len(curves) / columns), height=1.6, sharex=True)
        for axis, (title, (steps, values)) in zip(axes, curves.items(), strict=False):
            axis.plot(
                *thinned(np.asarray(steps, float), np.asarray(values, float)), color=series_colour(0), linewidth=1.1
            )
            for start in starts[1:]:
                axis.axvline(start, color=MUTED, linewidth=0.6, linestyle=(0, (2, 2)), zorder=1)
            axis.set_title(short(title, 34))
            axis.yaxis.set_major_locator(MaxNLocator(4))
            _log_if_wide(axis, [values])
        for axis in axes[len(curves) :]:
            axis.set_visible(False)
        return svg(figure, "Other quantities over the steps")


def histograms(values: Mapping[str, Float[np.ndarray, "..."]], label: str) -> str:
    """A histogram per kind of unit, of numbers between 0 and 1."""
    with styled("histograms"):
        figure, axes = panels(len(values), height=1.9, sharex=True)
        for axis, (title, numbers) in zip(axes, values.items(), strict=True):
            flat = np.asarray(numbers, float).ravel()
            counts, edges = np.histogram(flat, bins=20, range=(0, 1))
            axis.bar(edges[:-1], 100 * counts / max(len(flat), 1), width=np.diff(edges) * 0.88, align="edge",
                     color=series_colour(0))  # fmt: skip
            axis.axvline(flat.mean(), color=series_colour(1), linewidth=1.4)
            side = "left" if flat.mean() < 0.6 else "right"
            text = f"  mean {flat.mean():.2f}  "
            axis.text(flat.mean(), 0.93, text, color=series_colour(1), fontsize=8, ha=side,
                      transform=axis.get_xaxis_transform())  # fmt: skip
            axis.set_title(f"{short(title, 24)} ({len(flat):,} units)")
            axis.set_xlabel(label)
            axis.grid(axis="x", visible=False)
            axis.set_ylim(0, axis.get_ylim()[1] * 1.15)
        axes[0].set_ylabel("% of units")
        return svg(figure, f"Histograms of {label}")


def lines(
    curves: Mapping[str, Sequence[float]],
    ticks: Sequence[str],
    label: str,
    name: str,
    *,
    order: Sequence[str] = (),
    below: str = "",
    limits: tuple[float, float] | None = None,
) -> str:
    """A line per series, over named stages.

    Args:
      curves: values by name, one per stage; NaN if there is none.
      ticks: names of the stages.
      label: label of the vertical axis.
      name: name of the figure.
      order: all names, which decides colours; default: those of the curves.
      below: label of the horizontal axis.
      limits: limits of the vertical axis.
    """
    with styled(name):
        figure, (axis,) = grid(1, 1, height=2.5)
        stages = np.arange(len(ticks))
        for title, values in curves.items():
            place = list(order or curves).index(title)
            _line(axis, stages, np.asarray(values, float), color=series_colour(place), linestyle=series_dash(place),
                  marker="o", markersize=4, label=short(title, 30))  # fmt: skip
        axis.set_xticks(stages, [short(tick, max(110 // max(len(ticks), 1) - 2, 3)) for tick in ticks])
        axis.set_ylabel(label)
        axis.set_xlabel(below)
        axis.margins(x=0.04)
        if limits is not None:
            axis.set_ylim(*limits)
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return svg(figure, f"{label} by stage")


def compared_retention(
    tasks: Sequence[str],
    methods: Mapping[str, Float[np.ndarray, "seeds rows tasks"]],
    joint: Mapping[str, Float[np.ndarray, " tasks"]],
    order: Sequence[str],
    unit: str,
) -> str:
    """A panel per task with a line per method: mean over seeds, with their range as a band.

    Args:
      tasks: names.
      methods: scores of each method that learned the tasks one by one.
      joint: mean scores of methods that learned all tasks at once, drawn as horizontal lines.
      order: all methods, which decides colours.
      unit: unit of the scores.
    """
    columns = per_row(len(tasks))
    length = max((scores.shape[1] for scores in methods.values()), default=1)
    with styled("compared retention"):
        rows = math.ceil(len(tasks) / columns)
        figure, axes = grid(columns, rows, height=2.0 if rows > 1 else 2.5, sharex=True, sharey=True)
        for index, axis in enumerate(axes):
            if index >= len(tasks):
                axis.set_visible(False)
                continue
            for method in order:
                look: dict[str, Any] = {"color": series_colour(order.index(method)), "label": short(method, 24)}
                if method in joint:
                    axis.axhline(joint[method][index], linestyle=(0, (4, 3)), linewidth=1.2, **look)
                elif method in methods:
                    seeds = methods[method][:, index:, index]
                    steps = np.arange(index + 1, index + 1 + seeds.shape[1])
                    if len(seeds) > 1 and np.isfinite(seeds).all():
                        band: dict[str, Any] = {"color": look["color"], "alpha": 0.16, "linewidth": 0}
                        axis.fill_between(steps, seeds.min(axis=0), seeds.max(axis=0), **band)
                    dash = series_dash(order.index(method))
                    _line(axis, steps, _mean(seeds), marker="o", markersize=3.5, linestyle=dash, **look)
            axis.set_title(f"{index + 1} {short(tasks[index], 110 // columns - 4)}")
            _task_axis(axis, length)
            axis.margins(x=0.12, y=0.12)
        outer_labels(axes, columns, len(tasks), "tasks learned", f"score{' in %' if unit == '%' else ''}")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 6), fontsize=9)
        return svg(figure, "Score of each task after every task, by method")


def bars(quantities: Mapping[str, Mapping[str, Sequence[float]]], name: str = "") -> str:
    """Horizontal bars, one panel per quantity and one bar per method: mean over seeds, with seeds as dots.

    Args:
      quantities: values per seed, by quantity and method.
      name: distinguishes several such figures on one page.
    """
    names = list(dict.fromkeys(method for values in quantities.values() for method in values))
    with styled(f"bars {name}"):
        figure, axes = grid(len(quantities), 1, height=max(0.55 + 0.34 * len(names), 1.3), sharey=True)
        for axis, (title, values) in zip(axes, quantities.items(), strict=True):
            for place, method in enumerate(names):
                seeds = np.asarray([value for value in values.get(method, ()) if np.isfinite(value)])
                if not len(seeds):
                    continue
                colour = series_colour(place)
                axis.barh(place, seeds.mean(), height=0.62, color=colour, alpha=0.42)
                axis.plot(seeds, np.full(len(seeds), place), "o", color=colour, markersize=4.5, markeredgewidth=0)
            axis.axvline(0, color=MUTED, linewidth=0.8)
            axis.set_title(title)
            axis.grid(axis="y", visible=False)
            axis.margins(x=0.08)
        axes[0].set_yticks(range(len(names)), [short(method, 24) for method in names], color=INK, fontsize=9)
        axes[0].set_ylim(len(names) - 0.45, -0.55)
        return svg(figure, f"{', '.join(quantities)} by method")


def thinned(
    steps: Float[np.ndarray, " points"], values: Float[np.ndarray, " points"], points: int = _POINTS
) -> tuple[Float[np.ndarray, " kept"], Float[np.ndarray, " kept"]]:
    """At most `points` points: means over equal numbers of neighbours, so that only noise is lost.

    >>> thinned(np.arange(4.0), np.array([1.0, 3.0, 5.0, 7.0]), points=2)[1].tolist()
    [2.0, 6.0]
    """
    if len(values) <= points:
        return steps, values
    parts = np.array_split(np.arange(len(values)), points)
    return np.array([steps[part].mean() for part in parts]), np.array([values[part].mean() for part in parts])


def _line(axis: Axes, steps: Any, values: Float[np.ndarray, " points"], **look: Any) -> None:
    """A line through the finite points; gaps are bridged."""
    known = np.isfinite(values)
    if known.any():
        axis.plot(np.asarray(steps)[known], values[known], **look)


def _mean(seeds: Float[np.ndarray, "seeds stages"]) -> Float[np.ndarray, " stages"]:
    known = np.isfinite(seeds)
    total = np.where(known, seeds, 0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)


def _end_title(axis: Axes, curve: Float[np.ndarray, " rows"]) -> None:
    """The last score as a title, where no curve crosses it."""
    known = curve[np.isfinite(curve)]
    if len(known):
        axis.set_title(number(float(known[-1])), loc="right", color=series_colour(0))


def _task_axis(axis: Axes, count: int) -> None:
    axis.set_xlim(0.5, count + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(min(count, 8), integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(4))


def _log_if_wide(axis: Axes, curves: Sequence[Sequence[float]]) -> None:
    values = np.concatenate([np.asarray(curve, float) for curve in curves])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() / values.min() > 100:
        axis.set_yscale("log")
        # By default powers are written in TeX, which stays as it is where text stays text.
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
