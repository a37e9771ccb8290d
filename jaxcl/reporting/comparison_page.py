"""The HTML of comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxcl.reporting import frontier_page, plots
from jaxcl.reporting.comparison_data import FURTHER, MEASURES, SIGNED, spread
from jaxcl.reporting.matrix_table import matrix_table
from jaxcl.reporting.page import address, details, duration, figure, number, page, section, table, text
from jaxcl.reporting.run_data import scores

_MEANINGS = (
    "OP: mean score over all tasks at the end. BWT: change of the earlier tasks since each was learned. "
    "Gain: over the model before any training. "
    "Forgetting: drop of the earlier tasks from their best score. FWT: gain on a task before it was trained on. "
    "Intransigence: gap to joint training right after learning."
)
Content = Mapping[str, Any]


def render(content: Content) -> str:
    """The HTML page of one comparison."""
    methods = list(content["methods"])
    body = [
        _header(content),
        section("Summary", _summary(content), figure(_bars(content)), note=_seeds_note(content)),
        *frontier_page.sections(content),
        _retention(content),
        _per_task(content),
        _further(content),
        _runs(content),
    ]
    return page(f"{', '.join(methods)} on {len(content['tasks'])} tasks", body)


def render_overview(title: str, parts: Sequence[tuple[str, str, Content]]) -> str:
    """The HTML page about several comparisons, each given by name, link to its page, and content."""
    sections = []
    for name, link, content in parts:
        tasks = " → ".join(str(task) for task in content["tasks"])
        sections.append(
            section(
                name,
                _summary(content),
                figure(_bars(content, name)),
                f'<p><a href="{text(link)}">The whole comparison, with a report for each run</a></p>',
                note=f"{text(tasks)}. {_seeds_note(content)}",
            )
        )
    return page(title, [f'<header><p class="eyebrow">jaxcl</p><h1>{text(title)}</h1></header>', *sections])


def _header(content: Content) -> str:
    methods, tasks = list(content["methods"]), content["tasks"]
    seeds = sorted({seed for summary in content["methods"].values() for seed in summary["seeds"]})
    path = ' <span class="to">→</span> '.join(f"<bdi>{text(task)}</bdi>" for task in tasks)
    unfinished = [row["folder"] for row in content["runs"] if row.get("finished") is False]
    warning = f'<p class="warn">Not finished: {text(", ".join(unfinished))}</p>' if unfinished else ""
    names = f"{', '.join(methods[:-1])} and {methods[-1]}" if len(methods) > 1 else methods[0]
    swept = sum(len(point["runs"]) for point in content.get("sweep", {}).get("points", []))
    facts = [
        f"{swept or len(content['runs'])} run{'s' if (swept or len(content['runs'])) != 1 else ''}",
        *([f"in detail: the {len(content['runs'])} with a chosen setting"] if swept else []),
        f"seed{'s' if len(seeds) != 1 else ''} {', '.join(map(str, seeds))}",
        ", ".join(dict.fromkeys(content["metric"])),
    ]
    return (
        f'<header><p class="eyebrow">jaxcl comparison</p><h1>{text(names)}</h1><p class="path">{path}</p>'
        f'<div class="facts">{"".join(f"<span>{text(fact)}</span>" for fact in facts)}</div>{warning}</header>'
    )


def _seeds_note(content: Content) -> str:
    counts = {len(summary["seeds"]) for summary in content["methods"].values()}
    if counts == {1}:
        return f"One seed per method. {_MEANINGS}"
    return f"Mean ± standard deviation over seeds; dots are single runs. {_MEANINGS}"


def _summary(content: Content) -> str:
    """The summary table, with the best value of a column in bold."""
    shown = [item for item in MEASURES if any(s[item[0]]["mean"] is not None for s in content["methods"].values())]
    best = {name: _best(content, name, higher) for name, _, higher in shown}
    rows = []
    for method, summary in content["methods"].items():
        cells = [text(method)]
        for name, _, _ in shown:
            if name == "seconds":
                mean = summary[name]["mean"]
                words = number(None) if mean is None else duration(mean)
            else:
                words = spread(summary[name], signed=name in SIGNED)
            cells.append(f"<b>{text(words)}</b>" if method in best[name] else text(words))
        rows.append(cells)
    heads = ["Method", *("Time per run" if name == "seconds" else title for name, title, _ in shown)]
    return table(heads, rows, numbers=range(1, len(heads)))


def _best(content: Content, name: str, higher: bool) -> set[str]:
    """Methods with the best mean, without joint training (an upper bound); none if fewer than two remain."""
    if name not in ("op", "bwt", "forgetting") or len(set(content["higher_is_better"])) > 1:
        return set()
    if name == "op":
        higher = content["higher_is_better"][0]
    joint = {row["method"] for row in content["runs"] if row.get("joint")}
    summaries = {method: summary[name]["mean"] for method, summary in content["methods"].items() if method not in joint}
    means = {method: mean for method, mean in summaries.items() if mean is not None}
    top = max(means.values(), default=None) if higher else min(means.values(), default=None)
    return {method for method, mean in means.items() if mean == top} if len(means) > 1 else set()


def _bars(content: Content, name: str = "") -> str:
    percent = " (%)" if content.get("unit") else ""
    panels = {
        f"Overall performance{percent}": "op",
        f"Backward transfer{' (points)' if percent else ''}": "bwt",
    }
    values = {
        title: {method: summary[key]["values"] for method, summary in content["methods"].items()}
        for title, key in panels.items()
    }
    return plots.bars({title: part for title, part in values.items() if any(part.values())}, name)


def _retention(content: Content) -> str:
    """Curves per task and method, and of the mean over tasks."""
    one_by_one = {name: runs for name, runs in _matrices(content, joint=False).items() if runs.shape[1] > 1}
    if not one_by_one:
        return ""
    joint = {name: runs[:, -1].mean(axis=0) for name, runs in _matrices(content, joint=True).items()}
    curves = plots.compared_retention(
        content["tasks"], one_by_one, joint, list(content["methods"]), content.get("unit", "")
    )
    learned = {
        name: [float(np.mean([run[row, : row + 1].mean() for run in runs])) for row in range(runs.shape[1])]
        for name, runs in one_by_one.items()
    }
    stages = [f"{index + 1}" for index in range(max(len(curve) for curve in learned.values()))]
    padded = {name: [*curve, *[np.nan] * (len(stages) - len(curve))] for name, curve in learned.items()}
    return section(
        "Retention of each task",
        figure(curves),
        "<h3>Mean over the tasks learned so far</h3>",
        figure(
            plots.lines(
                padded, stages, "mean score", "mean retention", order=list(content["methods"]), below="tasks learned"
            )
        ),
        note="Scores since each task was learned; bands span the seeds. Dashed: all tasks learned at once.",
    )


def _matrices(content: Content, *, joint: bool) -> dict[str, Float[np.ndarray, "seeds rows tasks"]]:
    """Matrices of each method's runs, cut to the rows that all of them have."""
    found: dict[str, list[Float[np.ndarray, "rows tasks"]]] = {}
    for row in content["runs"]:
        if bool(row.get("joint")) == joint and row["matrix"]:
            found.setdefault(row["method"], []).append(scores({"matrix": row["matrix"], "metric": content["metric"]}))
    return {name: np.stack([run[: min(map(len, runs))] for run in runs]) for name, runs in found.items()}


def _per_task(content: Content) -> str:
    """Score of each task at the end, by method."""
    every = {**_matrices(content, joint=False), **_matrices(content, joint=True)}
    rows = []
    for method in content["methods"]:
        if method not in every:
            continue
        last = every[method][:, -1]
        deviation = last.std(axis=0, ddof=1) if len(last) > 1 else np.full(last.shape[1], np.nan)
        cells = [
            spread({"mean": mean if np.isfinite(mean) else None, "std": std if np.isfinite(std) else None})
            for mean, std in zip(last.mean(axis=0), deviation, strict=True)
        ]
        rows.append([text(method), *map(text, cells)])
    heads = ["Method", *(f"{index + 1} {text(task)}" for index, task in enumerate(content["tasks"]))]
    return section("Each task at the end", table(heads, rows, numbers=range(1, len(heads))))


def _further(content: Content) -> str:
    """The numbers of the other measures."""
    names = dict.fromkeys(name for summary in content["methods"].values() for name in summary.get("further", {}))
    parts = []
    for name in names:
        measured = {method: s["further"][name] for method, s in content["methods"].items() if name in s["further"]}
        shown = [
            (field, title)
            for field, title in FURTHER
            if any(part.get(field, {}).get("mean") is not None for part in measured.values())
        ]
        rows = [
            [text(method), *(text(spread(part[field], signed=field in SIGNED)) for field, _ in shown)]
            for method, part in measured.items()
        ]
        heads = ["Method", *(title for _, title in shown)]
        parts.append(f"<h3>{text(name)}</h3>{table(heads, rows, numbers=range(1, len(heads)))}")
    note = "Forgetting rate: mean over the earlier tasks of the score right after learning minus that at the end."
    return section("Other measures of the same runs", *parts, note=note)


def _runs(content: Content) -> str:
    """Every run with its matrix and a link to its report."""
    parts = []
    for row in content["runs"]:
        numbers = f"OP {number(row.get('op'))}, BWT {number(row.get('bwt'), signed=True)}"
        heading = f'{text(row["method"])}, seed {text(row["seed"])} <span class="muted">{numbers}</span>'
        matrix = matrix_table({**row, "tasks": content["tasks"], "metric": content["metric"],
                               "higher_is_better": content["higher_is_better"]})  # fmt: skip
        link = f'<p><a href="{address(row["folder"])}/report.html">Report of this run</a></p>'
        parts.append(details(heading, link + matrix))
    return section("The runs", *parts)
