"""Pictures of records: retention against learning, and how much a method's setting matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.frontier.methods import Rival, option_of, with_option
from benchmarks.frontier.records import Point, Record
from benchmarks.frontier.summary import best_settings, by_setting
from benchmarks.frontier.testbeds import TESTBEDS
from jaxcl.reporting import frontier
from jaxcl.reporting.frontier_page import draw_method

Finals = dict[Any, list[float]]


def draw_frontier(records: Sequence[Record], path: Path) -> Path:
    """Retention against learning as PNG, a line per name; the best setting ringed."""
    best = best_settings(records)
    better = TESTBEDS[records[0].point.testbed].higher_is_better
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for place, (name, settings) in enumerate(by_setting(records).items()):
        points = [
            frontier.Point(name, setting, [{"seed": one.point.seed, **one.results} for one in own],
                           chosen=setting == best[name].setting)
            for setting, own in settings.items()
        ]  # fmt: skip
        draw_method(axis, points, place, better)
    axis.set_xlabel("score right after each task, mean")
    axis.set_ylabel("change of earlier tasks since each was learned (BWT)")
    if not better:
        axis.invert_xaxis()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path


def draw_sensitivity(records: Sequence[Record], rivals: Mapping[str, Rival], path: Path) -> Path:
    """The final mean by learning rate and by a method's own knob, each around the chosen setting, as PNG.

    Args:
      records: of one testbed and order.
      rivals: the methods to show, by name; those without records are left out.
      path: the file.
    """
    best = best_settings(records)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    by_rate, by_knob = figure.subplots(1, 2, sharey=True)
    for place, name in enumerate(name for name in rivals if name in best):
        own = [one for one in records if one.point.name == name and "failed" not in one.results]
        rates, values = around(best[name], rivals[name].knob, own)
        _line(by_rate, rates, name, f"C{place % 10}")
        numbers = {value: finals for value, finals in values.items() if not isinstance(value, str)}
        if len(numbers) > 1:
            chosen = option_of(best[name].options, rivals[name].knob)
            relative = {value / chosen: finals for value, finals in numbers.items()}
            _line(by_knob, relative, f"{name}: {rivals[name].knob} {chosen:g}", f"C{place % 10}")
    by_rate.set_xlabel("learning rate, the rest as chosen")
    by_knob.set_xlabel("own knob, as a multiple of the chosen one")
    by_rate.set_ylabel(f"mean at the end, {'%' if TESTBEDS[records[0].point.testbed].higher_is_better else 'nats'}")
    for axis in (by_rate, by_knob):
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path


def around(
    best: Point, knob: str, records: Sequence[Record]
) -> tuple[dict[float, list[float]], dict[Any, list[float]]]:
    """Final means of a method's runs by learning rate at the chosen options, and by knob at the chosen learning rate.

    Args:
      best: the chosen setting.
      knob: dotted name of the method's own knob; empty if it has none.
      records: of the method.
    """
    rates: Finals = {}
    values: Finals = {}
    for record in records:
        point, final = record.point, record.results["final"]
        if point.options == best.options:
            rates.setdefault(point.learning_rate, []).append(final)
        if not knob or point.learning_rate != best.learning_rate:
            continue
        value = option_of(point.options, knob)
        if with_option(best.options, knob, value) == point.options:
            values.setdefault(value, []).append(final)
    return rates, values


def _line(axis: Any, finals: Mapping[float, Sequence[float]], label: str, colour: str) -> None:
    """The mean over seeds at each place."""
    places = sorted(finals)
    axis.plot(places, [sum(finals[at]) / len(finals[at]) for at in places], "o-", label=label, color=colour)
