"""Heat maps of layers × units, and of the overlap between tasks: functions of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from jaxcl.reporting.style import (
    DASH,
    HEAT,
    INK,
    WIDTH,
    Picture,
    grid,
    outer_labels,
    per_row,
    series_colour,
    short,
    styled,
    ticks,
)

_COLUMNS = 256  # largest number of columns of a map; more cannot be seen


def heat_maps(
    maps: Mapping[str, Shaped[np.ndarray, "layers units"]], units: str, name: str, *, sort: bool = False
) -> Picture:
    """Maps of layers × units on a common colour scale, with layer 1 at the bottom.

    Args:
      maps: values by title, all with the same shape.
      units: name of the columns.
      name: name of the figure.
      sort: sort the units of each layer from large to small, for maps with too many units to see single ones.
    """
    first = next(iter(maps.values()))
    layers, count = first.shape
    columns = min(len(maps), 1 if count > 2 * _panel_units(2) else _map_columns(len(maps)))
    rows = math.ceil(len(maps) / columns)
    values = {title: _compact(np.asarray(one, float), sort) for title, one in maps.items()}
    low, high = _limits(list(values.values()))
    width = WIDTH if columns > 1 or count > 40 else WIDTH * 0.62
    with styled(name):
        figure, axes = grid(columns, rows, width=width, height=_map_height(layers, count, columns, width), sharex=True,
                            sharey=True)  # fmt: skip
        for axis, (title, one) in zip(axes, values.items(), strict=False):
            image = axis.imshow(one, aspect="auto", origin="lower", cmap=HEAT, vmin=low, vmax=high,
                                interpolation="nearest", extent=(0.5, count + 0.5, 0.5, layers + 0.5))  # fmt: skip
            _map_axis(axis, title, len(maps), columns)
            if layers * count <= 64 and columns == 1:
                _write_values(axis, one, low, high)
        outer_labels(axes, columns, len(maps), f"{units}, sorted in each layer" if sort else units, "layer")
        bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, aspect=22)
        bar.outline.set_visible(False)
        for axis in axes[len(maps) :]:
            axis.set_visible(False)
        return Picture(figure, name, f"Heat maps of layers by {units}: {', '.join(maps)}")


def selected(maps: Mapping[str, Shaped[np.ndarray, "layers heads"]], name: str = "selected heads") -> Picture:
    """Which heads each task selected."""
    with styled(name):
        layers, count = next(iter(maps.values())).shape
        columns = _map_columns(len(maps))
        rows = math.ceil(len(maps) / columns)
        figure, axes = grid(columns, rows, height=_map_height(layers, count, columns, WIDTH), sharex=True, sharey=True)
        for axis, (title, chosen) in zip(axes, maps.items(), strict=False):
            axis.set_facecolor("none")
            mask = np.asarray(chosen, bool)
            layer, head = np.nonzero(mask)
            axis.set_xlim(0.5, count + 0.5)
            axis.set_ylim(0.5, layers + 0.5)
            for one_layer, one_head in zip(layer + 0.5, head + 0.5, strict=True):
                axis.add_patch(_square(one_head, one_layer, series_colour(0)))
            wide = mask.any(axis=1).sum()
            _map_axis(axis, f"{title}: {mask.sum()} in {wide} layer{'' if wide == 1 else 's'}", len(maps), columns)
            axis.spines[:].set_visible(True)
        for axis in axes[len(maps) :]:
            axis.set_visible(False)
        outer_labels(axes, columns, len(maps), "head", "layer")
        return Picture(figure, name, "Heads selected by each task")


def overlaps(marks: Mapping[str, Shaped[np.ndarray, "tasks ..."]], tasks: Sequence[str], name: str) -> Picture:
    """Tasks × tasks, per kind of unit: the share that both need of the units that either needs.

    Args:
      marks: whether a task needs a unit, by kind of unit.
      tasks: names of the tasks.
      name: name of the figure.
    """
    columns = min(len(marks), 3)
    rows, count = math.ceil(len(marks) / columns), len(tasks)
    width = WIDTH * min(0.3 * columns + 0.06 + 0.02 * count, 1.0)
    with styled(name):
        figure, axes = grid(columns, rows, width=width, height=0.84 * width / columns, sharey=True)
        for axis, (title, one) in zip(axes, marks.items(), strict=False):
            shares = common(np.asarray(one, bool).reshape(count, -1))
            shown = np.where(np.tri(count, k=-1, dtype=bool), 100 * shares, np.nan)
            axis.imshow(shown, cmap=HEAT, vmin=0, vmax=100, interpolation="nearest")
            axis.set_title(title)
            axis.grid(visible=False)
            axis.spines[:].set_visible(False)
            axis.set_xticks(range(count), ticks(tasks, 96 // columns // count))
            axis.set_yticks(range(count), [short(task, 18) for task in tasks])
            axis.set_xlim(-0.5, count - 1.5)  # only cells below the diagonal are shown
            axis.set_ylim(count - 0.5, 0.5)
            for (row, column), share in np.ndenumerate(shown):
                if column < row:
                    text = DASH if np.isnan(share) else f"{share:.0f}%"
                    axis.text(column, row, text, ha="center", va="center", fontsize=8 if count < 9 else 6.5,
                              color=INK if np.isnan(share) else "white" if share < 60 else "black")  # fmt: skip
        for axis in axes[len(marks) :]:
            axis.set_visible(False)
        return Picture(figure, name, f"Overlap between tasks: {', '.join(tasks)}")


def common(marks: Shaped[np.ndarray, "tasks units"]) -> Float[np.ndarray, "tasks tasks"]:
    """The share that both tasks need of the units that either needs (Jaccard index); NaN if neither needs any.

    >>> common(np.array([[1, 1, 1, 0], [0, 0, 1, 1]], bool)).tolist()
    [[1.0, 0.25], [0.25, 1.0]]
    """
    both = marks.astype(float) @ marks.T.astype(float)
    own = np.diagonal(both)
    either = own[:, None] + own - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def _panel_units(columns: int) -> int:
    return int(WIDTH / columns * 5)


def _map_columns(count: int) -> int:
    return count if count <= 3 else per_row(count)


def _map_height(layers: int, count: int, columns: int, width: float) -> float:
    """Height for about square cells if there are few units, between a line of text and half a page."""
    side = (width / columns - 0.9) / min(count, 40)
    return float(np.clip(layers * min(side, 0.34) + 0.75, 1.3, 4.6))


def _map_axis(axis: Axes, title: str, panels: int, columns: int) -> None:
    if panels > 1 or title:
        axis.set_title(short(title, 110 // columns), fontweight="bold" if columns < 4 else "normal")
    axis.grid(visible=False)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.spines[:].set_visible(False)


def _square(head: float, layer: float, colour: str) -> Any:
    return Rectangle((head + 0.08, layer + 0.08), 0.84, 0.84, facecolor=colour, edgecolor="none")


def _compact(values: Float[np.ndarray, "layers units"], sort: bool) -> Float[np.ndarray, "layers columns"]:
    if sort:
        values = -np.sort(-values, axis=1)
    if values.shape[1] <= _COLUMNS:
        return values
    return np.stack([part.mean(axis=1) for part in np.array_split(values, _COLUMNS, axis=1)], axis=1)


def _limits(maps: Sequence[Float[np.ndarray, "layers units"]]) -> tuple[float, float]:
    values = np.concatenate([one.ravel() for one in maps])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(min(values.min(), 0.0)), float(values.max())
    return low, high if high > low else low + 1.0


def _write_values(axis: Axes, values: Float[np.ndarray, "layers units"], low: float, high: float) -> None:
    digits = int(np.clip(2 - math.ceil(math.log10(max(high, 1e-9))), 0, 6))
    for (layer, unit), value in np.ndenumerate(values):
        dark = (value - low) / (high - low) < 0.6
        axis.text(unit + 1, layer + 1, f"{value:.{digits}f}", ha="center", va="center", fontsize=7.5,
                  color="white" if dark else "black")  # fmt: skip
