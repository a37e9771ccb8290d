"""Pictures of a method's own arrays (`importance/*.npz`): importance, soft masks, selected heads.

Arrays are told apart by name and number of axes:

- `importance_X` `[layers, X]`: importance of units so far. With `domains_X` `[1 + tasks, layers, X]` beside it
  (place 0: general knowledge) it is a soft mask between 0 and 1, and what it leaves free is shown.
- `selected_X` `[tasks, layers, X]`, true or false: units chosen for each task.
- any other `[layers, units]` or `[tasks, layers, units]`: heat maps.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from jaxcl.reporting import heat_maps, plots
from jaxcl.reporting.page import figure, section, table, text
from jaxcl.reporting.run_data import RunData
from jaxcl.reporting.style import DASH, MINUS

_MATTERS = 0.5  # importance above which a unit counts as needed
_SINGLE = 96  # units in a layer up to which each keeps its place; more are sorted
_NAMES = {"heads": "attention heads", "intermediate": "intermediate units", "output": "output units"}


def table_sections(run: RunData) -> list[str]:
    """The sections that the arrays of a run give; none for a method without any."""
    tables = {name: array for name, array in run.tables.items() if array.size and array.ndim in (2, 3)}
    masks = {
        name.removeprefix("importance_"): np.asarray(array, float)
        for name, array in tables.items()
        if name.startswith("importance_") and f"domains_{name.removeprefix('importance_')}" in tables
    }
    domains = {kind: np.asarray(tables[f"domains_{kind}"], float) for kind in masks}
    used = {f"importance_{kind}" for kind in masks} | {f"domains_{kind}" for kind in masks}
    chosen = {name: array for name, array in tables.items() if name.startswith("selected_")}
    rest = {name: np.asarray(array, float) for name, array in tables.items() if name not in used | set(chosen)}
    return [
        _capacity(run, masks, domains),
        _importance(run, masks, domains),
        section("Importance", *(_maps(run, name, array) for name, array in rest.items())),
        *(_selected(run, array) for array in chosen.values() if array.ndim == 3),
    ]


def _capacity(
    run: RunData,
    masks: dict[str, Float[np.ndarray, "layers units"]],
    domains: dict[str, Float[np.ndarray, "places layers units"]],
) -> str:
    """How much of the network the soft mask still lets learn."""
    if not masks:
        return ""
    stages = min(run.learned, min(len(array) for array in domains.values()) - 1)
    names = ["general", *run.tasks[:stages]]
    left = {
        _NAMES.get(kind, kind): [100 * (1 - array[: stage + 1].max(axis=0).mean()) for stage in range(stages + 1)]
        for kind, array in domains.items()
    }
    histograms = plots.histograms(
        {_NAMES.get(kind, kind): 1 - mask for kind, mask in masks.items()}, f"soft mask, 1 {MINUS} importance"
    )
    curves = plots.lines(left, names, "% of capacity left", "capacity", limits=(0, 100))
    shares = [
        f"{100 * (mask > _MATTERS).mean():.0f}% of {text(_NAMES.get(kind, kind))}" for kind, mask in masks.items()
    ]
    protected = f"More than half protected: {', '.join(shares)}."
    return section(
        "Soft masks and the capacity left",
        figure(histograms, f"After the last domain. A unit at 0 is frozen, one at 1 learns freely. {protected}"),
        "<h3>Capacity left after each domain</h3>",
        figure(curves, "Mean of the soft mask over units: the share of each update that still gets through."),
        note=f"Units that matter for what is known get smaller updates: each is multiplied by 1 {MINUS} importance.",
    )


def _importance(
    run: RunData,
    masks: dict[str, Float[np.ndarray, "layers units"]],
    domains: dict[str, Float[np.ndarray, "places layers units"]],
) -> str:
    parts = []
    for kind, mask in masks.items():
        array, units = domains[kind], _NAMES.get(kind, kind)
        done = min(run.learned, len(array) - 1)
        titles = ["general", *run.tasks[:done]]
        maps = {f"{place} {title}" if place else title: array[place] for place, title in enumerate(titles)}
        wide = mask.shape[1] > _SINGLE
        shown = {"all so far": mask} if wide else {**maps, "all so far": mask}
        parts.append(f"<h3>{text(units.capitalize())}</h3>")
        parts.append(figure(heat_maps.heat_maps(shown, "unit" if wide else "head", f"importance {kind}", sort=wide)))
        if not wide and done > 1:
            parts.append(
                _overlap(
                    titles[1:],
                    array[1 : done + 1] > 0.5,
                    "Heads that matter to both (above 0.5), of those that matter to either",
                )
            )
    return section(
        "Importance of units",
        *parts,
        note="0: not needed, 1: protected. The last map is the maximum over all before it.",
    )


def _selected(run: RunData, array: np.ndarray) -> str:
    count = min(run.learned, len(array))
    marks = np.asarray(array[:count], bool)
    if not marks.any():
        return ""
    maps = {f"{index + 1} {run.tasks[index]}": marks[index] for index in range(count)}
    return section(
        "Heads selected by each task",
        figure(heat_maps.selected(maps)),
        _overlap(list(run.tasks[:count]), marks, "Heads selected by both, of those selected by either")
        if count > 1
        else "",
        note="The memory of a task is distilled through these heads.",
    )


def _maps(run: RunData, name: str, array: Float[np.ndarray, "..."]) -> str:
    title, _, kind = name.partition("_")
    units = {"intermediate": "unit", "output": "unit"}.get(kind, "head")
    wide = array.shape[-1] > _SINGLE
    maps = (
        {"": array}
        if array.ndim == 2
        else {
            f"{index + 1} {run.tasks[index]}" if index < len(run.tasks) else str(index + 1): one
            for index, one in enumerate(array[: max(run.learned, 1)])
        }
    )
    return f"<h3>{text(title.capitalize())}</h3>" + figure(heat_maps.heat_maps(maps, units, name, sort=wide))


def _overlap(names: list[str], marks: np.ndarray, heading: str) -> str:
    """Shares of units that two tasks have in common (Jaccard), under a heading."""
    rows = []
    for index, name in enumerate(names):
        cells = []
        for other in range(len(names)):
            either = np.logical_or(marks[index], marks[other]).sum()
            share = np.logical_and(marks[index], marks[other]).sum() / either if either else np.nan
            cells.append(DASH if not np.isfinite(share) else f"{100 * share:.0f}%" if other < index else "")
        rows.append([f"{index + 1} {text(name)}", *cells])
    if len(names) < 2:
        return ""
    heads = ["In common with", *(str(index + 1) for index in range(len(names) - 1))]
    return f"<h3>{text(heading)}</h3>" + table(heads, [row[:-1] for row in rows[1:]], numbers=range(1, len(names)))
