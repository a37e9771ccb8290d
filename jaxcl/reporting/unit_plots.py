"""Plots of units by domain: importance of sorted units, and shares of needed units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Shaped

from jaxcl.reporting.style import FAINT, INK, Picture, panels, per_row, series_colour, series_dash, short, styled, ticks

_POINTS = 200  # largest number of points of a curve; more cannot be seen


def sorted_units(
    domains: Mapping[str, Float[np.ndarray, "places layers units"]],
    together: Mapping[str, Float[np.ndarray, "layers units"]],
    names: Sequence[str],
    threshold: float,
    name: str,
) -> Picture:
    """A panel per kind of unit with a curve per domain: importance of units, sorted from large to small.

    Args:
      domains: importance for each of `names`, by kind of unit.
      together: importance for all domains together, by kind of unit.
      names: names of the domains.
      threshold: importance above which a unit counts as needed.
      name: name of the figure.
    """
    with styled(name):
        figure, axes = panels(len(domains), height=2.5, sharey=True)
        for axis, (kind, places) in zip(axes, domains.items(), strict=True):
            for place, (title, one) in enumerate(zip(names, places, strict=True)):
                axis.plot(*_falling(one), color=series_colour(place), linestyle=series_dash(place), linewidth=1.3,
                          label=short(title, 24))  # fmt: skip
            axis.plot(*_falling(together[kind]), color=INK, linewidth=2.2, label="all so far")
            axis.axhline(threshold, color=FAINT, linewidth=1)
            axis.set_title(f"{short(kind, 24)} ({together[kind].size:,})")
            axis.set_xlabel("% of units, most important first")
            axis.set_xlim(0, 100)
            axis.set_ylim(0, 1.02)
        axes[0].set_ylabel("importance")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
        return Picture(figure, name, f"Importance of sorted units: {', '.join(domains)}")


def needed_shares(
    own: Mapping[str, Sequence[float]], together: Mapping[str, Sequence[float]], names: Sequence[str], name: str
) -> Picture:
    """A panel per kind of unit: share of units needed by each domain, and by it or any earlier domain.

    Args:
      own: percentages per domain, by kind of unit.
      together: percentages for all domains up to each, by kind of unit.
      names: names of the domains.
      name: name of the figure.
    """
    stages = np.arange(len(names))
    room = 110 // per_row(len(own)) // max(len(names), 1) - 1
    with styled(name):
        figure, axes = panels(len(own), height=2.4, sharey=True)
        for axis, (kind, shares) in zip(axes, own.items(), strict=True):
            bars = axis.bar(stages, shares, width=0.62, color=series_colour(0), alpha=0.5, label="the domain itself")
            axis.bar_label(bars, [f"{share:.0f}" for share in shares], fontsize=7.5, padding=1, color=series_colour(0))
            axis.plot(stages, together[kind], color=series_colour(1), marker="o", markersize=4, label="all so far")
            for stage, share in list(zip(stages, together[kind], strict=True))[1:]:  # the first equals its bar
                axis.annotate(f"{share:.0f}", (stage, share), (0, 5), ha="center", fontsize=7.5,
                              textcoords="offset points", color=series_colour(1))  # fmt: skip
            axis.set_title(short(kind, 24))
            axis.set_xticks(stages, ticks(names, room))
            axis.set_ylim(0, 112)
            axis.set_yticks(range(0, 101, 25))
            axis.grid(axis="x", visible=False)
        axes[0].set_ylabel("% of units above 0.5")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return Picture(figure, name, f"Share of needed units after each domain: {', '.join(own)}")


def _falling(
    values: Shaped[np.ndarray, "..."],
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Shares of units in percent and their values, largest first."""
    falling = -np.sort(-np.asarray(values, float).ravel())
    places = np.unique(np.linspace(0, len(falling) - 1, min(len(falling), _POINTS)).round().astype(int))
    return 100 * (places + 0.5) / len(falling), falling[places]
