"""Pictures of a method's own arrays (`importance/*.npz`): importance, soft masks, selected heads.

Name and number of axes decide how an array is shown:

- `importance_X` `[layers, X]`: importance of units so far. Together with `domains_X` `[1 + tasks, layers, X]` (index 0:
  general knowledge) it is between 0 and 1 and defines a soft mask, or what one of this importance would be; the
  remaining capacity is shown as well.
- `importance_blocks` `[blocks, layers, heads]`: importance of heads by block of attention.
- `selected_X` `[tasks, layers, X]`, true or false: selected units per task.
- any other `[layers, units]` or `[tasks, layers, units]`: heat maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Shaped

from jaxcl.reporting import heat_maps, plots, unit_plots
from jaxcl.reporting.page import figure, section, text
from jaxcl.reporting.style import MINUS, Picture

_NEEDED = 0.5  # importance above which a unit counts as needed
_SINGLE = 96  # units per layer up to which maps are not sorted
_NAMES = {"heads": "attention heads", "intermediate": "intermediate units", "output": "output units"}
_NAMES |= {"tower_heads": "tower heads", "connector_output": "connector outputs"}
_NAMES |= {f"tower_{kind}": f"tower {_NAMES[kind]}" for kind in ("intermediate", "output")}

_BLOCKS = ("words on words", "words on images", "images on words", "images on images")

Draw = Callable[[Picture], str]
Tables = Mapping[str, Shaped[np.ndarray, "..."]]


def table_sections(tables: Tables, tasks: Sequence[str], learned: int, draw: Draw = Picture.svg) -> list[str]:
    """The sections about a method's arrays; none for a method without arrays.

    Args:
      tables: arrays by name.
      tasks: names of all tasks.
      learned: number of tasks learned so far.
      draw: turns a picture into an SVG element.
    """
    tables = {name: array for name, array in tables.items() if array.size and array.ndim in (2, 3)}
    blocks = tables.pop("importance_blocks", None)
    kinds = [
        name.removeprefix("importance_")
        for name in tables
        if name.startswith("importance_") and f"domains_{name.removeprefix('importance_')}" in tables
    ]
    masks = {kind: np.asarray(tables[f"importance_{kind}"], float) for kind in kinds}
    domains = {kind: np.asarray(tables[f"domains_{kind}"], float) for kind in kinds}
    used = {f"{part}_{kind}" for part in ("importance", "domains") for kind in kinds}
    chosen = {name: array for name, array in tables.items() if name.startswith("selected_")}
    # An array of zeros was not measured.
    rest = {n: np.asarray(array, float) for n, array in tables.items() if n not in used | set(chosen) and array.any()}
    learned = min([learned, len(tasks), *(len(array) - 1 for array in domains.values())])
    names = list(tasks)[:learned]
    return [
        *(_Masks(masks, domains, names, draw).sections() if masks else ()),
        section("Importance", *(_maps(name, array, names, draw) for name, array in rest.items())),
        "" if blocks is None else _by_block(np.asarray(blocks, float), draw),
        *(_selected(name, array, names, draw) for name, array in chosen.items() if array.ndim == 3),
    ]


class _Masks:
    """Importance of units between 0 and 1, per domain and for all domains so far, by kind of unit.

    Attributes:
      masks: importance for all domains so far.
      places: importance for general knowledge, if measured, and for each domain.
      titles: names of general knowledge and domains.
    """

    def __init__(
        self,
        masks: dict[str, Float[np.ndarray, "layers units"]],
        domains: dict[str, Float[np.ndarray, "places layers units"]],
        names: list[str],
        draw: Draw,
    ) -> None:
        first = 0 if any(array[0].any() for array in domains.values()) else 1
        self.masks = masks
        self.places = {kind: array[first : len(names) + 1] for kind, array in domains.items()}
        self.titles = ["general", *(f"{place} {name}" for place, name in enumerate(names, 1))][first:]
        self.draw = draw

    def sections(self) -> list[str]:
        """All sections."""
        return [self._capacity(), self._importance(), self._overlap()]

    def _capacity(self) -> str:
        """The capacity that the soft masks leave for learning."""
        before = {kind: np.maximum.accumulate(array, axis=0) for kind, array in self.places.items()}

        def named(of: Callable[[str], list[float]]) -> dict[str, list[float]]:
            return {_NAMES.get(kind, kind): of(kind) for kind in self.masks}

        left = named(lambda kind: [100.0, *(100 * (1 - one.mean()) for one in before[kind])])
        own = named(lambda kind: [100 * (one > _NEEDED).mean() for one in self.places[kind]])
        together = named(lambda kind: [100 * (one > _NEEDED).mean() for one in before[kind]])
        histograms = plots.histograms(
            {_NAMES.get(kind, kind): 1 - mask for kind, mask in self.masks.items()}, f"soft mask, 1 {MINUS} importance"
        )
        curves = plots.lines(left, ["start", *self.titles], "% of capacity left", "capacity", limits=(0, 104))
        shares = [
            f"{100 * (mask > _NEEDED).mean():.0f}% of {text(_NAMES.get(kind, kind))}"
            for kind, mask in self.masks.items()
        ]
        protected = f"More than half protected: {', '.join(shares)}."
        return section(
            "Soft masks and the capacity left",
            figure(histograms, f"After the last domain. A unit at 0 is frozen, one at 1 learns freely. {protected}"),
            "<h3>Capacity left after each domain</h3>",
            figure(curves, "Mean of the soft mask over units: the share of each update that it applies."),
            "<h3>Units needed by each domain</h3>",
            figure(
                self.draw(unit_plots.needed_shares(own, together, self.titles, "needed units")),
                f"Share of units with an importance above {_NEEDED}: for the domain, and for it or an earlier one.",
            ),
            note="Units that matter for earlier knowledge change less. A soft mask multiplies updates by "
            f"1 {MINUS} importance; a pull brings params back the more, the less is left here.",
        )

    def _importance(self) -> str:
        parts = []
        for kind, mask in self.masks.items():
            wide = mask.shape[1] > _SINGLE
            several = {} if wide else dict(zip(self.titles, self.places[kind], strict=True))
            maps = heat_maps.heat_maps(
                {**several, "all so far": mask}, "unit" if wide else "head", f"importance {kind}", sort=wide
            )
            parts += [f"<h3>{text(_NAMES.get(kind, kind).capitalize())}</h3>", figure(self.draw(maps))]
        curves = unit_plots.sorted_units(
            {_NAMES.get(kind, kind): array for kind, array in self.places.items()},
            {_NAMES.get(kind, kind): mask for kind, mask in self.masks.items()},
            self.titles,
            _NEEDED,
            "sorted units",
        )
        return section(
            "Importance of units",
            *parts,
            "<h3>Units by importance, domain by domain</h3>",
            figure(
                self.draw(curves),
                "Units of all layers together. The flatter the black curve, the less capacity is free.",
            ),
            note="0: not needed, 1: protected. All so far: maximum over general knowledge and all domains.",
        )

    def _overlap(self) -> str:
        if len(self.titles) < 2:
            return ""
        marks = {_NAMES.get(kind, kind): array > _NEEDED for kind, array in self.places.items()}
        return section(
            "Overlap between domains",
            figure(self.draw(heat_maps.overlaps(marks, self.titles, "overlap"))),
            note=f"The share that both domains need of the units that either needs (importance above {_NEEDED}).",
        )


def _selected(name: str, array: np.ndarray, names: list[str], draw: Draw) -> str:
    marks = np.asarray(array[: len(names)], bool)
    if not marks.any():
        return ""
    titles = [f"{place} {task}" for place, task in enumerate(names, 1)]
    parts = [figure(draw(heat_maps.selected(dict(zip(titles, marks, strict=True)), name.replace("_", " "))))]
    if len(names) > 1:
        kind = _NAMES.get(name.removeprefix("selected_"), name.removeprefix("selected_"))
        picture = heat_maps.overlaps({kind: marks}, titles, f"overlap {name}")
        parts += [
            "<h3>Share of heads selected by both tasks among those selected by either</h3>",
            figure(draw(picture)),
        ]
    return section(
        "Heads selected by each task", *parts, note="Heads whose attention is distilled on the task's memory."
    )


def _by_block(array: Float[np.ndarray, "blocks layers heads"], draw: Draw) -> str:
    """Heads by block of attention; a block that nothing was measured of is left out."""
    maps = {name: one for name, one in zip(_BLOCKS, array, strict=True) if one.any()}
    if not maps:
        return ""
    shares = [f"{name} {100 * one.sum() / array.sum():.0f}%" for name, one in maps.items()]
    return section(
        "Heads by block of attention",
        figure(draw(heat_maps.heat_maps(maps, "head", "importance blocks")), f"Shares: {', '.join(shares)}."),
        note="How much heads matter by what looks at what, per pair of tokens. Words on images: queries of words, keys "
        "of images.",
    )


def _maps(name: str, array: Float[np.ndarray, "..."], names: list[str], draw: Draw) -> str:
    title, _, kind = name.partition("_")
    units = {"intermediate": "unit", "output": "unit"}.get(kind, "head")
    maps = {"": array}
    if array.ndim == 3:
        shown = array[: max(len(names), 1)]
        titles = [*names, *map(str, range(len(names) + 1, len(shown) + 1))]
        maps = {f"{place} {task}": one for place, (task, one) in enumerate(zip(titles, shown, strict=False), 1)}
    picture = heat_maps.heat_maps(maps, units, name, sort=array.shape[-1] > _SINGLE)
    return f"<h3>{text(title.capitalize())}</h3>" + figure(draw(picture))
