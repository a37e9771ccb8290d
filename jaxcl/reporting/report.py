"""`report.html` of a run: the content of a run folder on one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.errors import UserError
from jaxcl.reporting import plots
from jaxcl.reporting.federated import clients_section
from jaxcl.reporting.goodput import goodput
from jaxcl.reporting.matrix_table import matrix_table
from jaxcl.reporting.page import card, details, duration, figure, number, page, section, size, table, text, write_page
from jaxcl.reporting.run_data import ODD, RunData, read_run, scores, unit, watched
from jaxcl.reporting.samples import task_samples
from jaxcl.reporting.stopped import stopped_section
from jaxcl.reporting.style import DASH
from jaxcl.reporting.tables import table_sections

_MEANINGS = {
    "op": ("Overall performance", "mean score over the tasks learned, at the end"),
    "bwt": ("Backward transfer", "change of the earlier tasks since each was learned; negative: forgotten"),
    "fwt": ("Forward transfer", "gain on the next task before training on it"),
    "gain": ("Gain", "over the model before any training, mean over the tasks learned"),
    "forgetting": ("Forgetting", "drop of the earlier tasks from their best score"),
    "intransigence": ("Intransigence", "gap to joint training right after learning: what could not be learned"),
}
_OWN = ("step", "task", "task_step", "kind", "steps", "seconds", "loss", "skipped", "spikes")


def write_report(run_folder: Path) -> Path:
    """Writes `report.html` to a run folder, from its files.

    Only `results.json` is required; sections about missing files (metrics, predictions, importance, configuration) are
    left out.

    Args:
      run_folder: the folder.

    Returns:
      The page.

    Raises:
      UserError: the folder does not exist or has no usable `results.json`.
    """
    run = read_run(Path(run_folder))
    try:
        content = render(run)
    except ODD as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{run.folder}: its files do not hold what a run writes: {reason}") from error
    return write_page(run.folder / "report.html", content)


def render(run: RunData) -> str:
    """The HTML page."""
    body = [
        _header(run),
        stopped_section(run),
        headline(run.results),
        _matrices(run),
        _retention(run),
        _losses(run),
        clients_section(run),
        *table_sections(run.tables, run.tasks, run.learned),
        _samples(run),
        _how(run),
        _configuration(run),
        f"<footer>Written by jaxcl {text(run.results.get('versions', {}).get('jaxcl', ''))}.</footer>",
    ]
    return page(f"{run.results['method']} on {len(run.tasks)} tasks", body)


def headline(results: Mapping[str, Any]) -> str:
    """Cards with the summary numbers of a run."""
    percent = unit(dict(results))
    cards = []
    for name, (title, meaning) in _MEANINGS.items():
        value = results.get(name)
        if value is None and name not in ("op", "bwt"):
            continue
        fall = -(value or 0)
        good = {"op": 0.0, "forgetting": fall, "intransigence": fall}.get(name, value)
        tone = "" if value is None or round(good or 0, 1) == 0 else "good" if (good or 0) > 0 else "bad"
        points = ("%" if name == "op" else " points") if percent else ""
        if name == "bwt" and results.get("joint"):
            meaning = "none: all tasks were learned at once"
        shown = number(value, signed=name in ("bwt", "fwt", "gain"))
        cards.append(card(title, shown, points.strip() if value is not None else "", meaning, tone))
    seconds = results.get("seconds")
    if isinstance(seconds, int | float) and np.isfinite(seconds):
        scales = ((100, 1, "s"), (6000, 60, "min"), (np.inf, 3600, "h"))
        _, scale, name = next(one for one in scales if seconds < one[0])
        digits = 0 if scale == 1 and seconds >= 10 else 1
        cards.append(
            card("Time", number(seconds / scale, digits), name, "training, evaluation and the method's passes")
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _header(run: RunData) -> str:
    results = run.results
    way = " + " if results.get("joint") else ' <span class="to">→</span> '
    facts = [f"seed {text(results['seed'])}"]
    if results.get("parameters"):
        facts.append(f"{size(results['parameters'])} parameters")
    if results.get("device"):
        facts.append(text(results["device"]))
    if results.get("stored_bytes"):
        facts.append(f"{size(results['stored_bytes'], 1024, 'B')} kept of earlier tasks")
    if results.get("peak_memory_bytes"):
        facts.append(f"{size(results['peak_memory_bytes'], 1024, 'B')} of device memory at peak")
    warning = ""
    if not results.get("finished", True):
        warning = f'<p class="warn">Not finished: {run.learned} of {len(run.tasks)} tasks learned so far.</p>'
    broken = "".join(f'<p class="warn">{text(problem)}</p>' for problem in run.problems)
    count = f"{len(run.tasks)} task{'s' if len(run.tasks) != 1 else ''}"
    return (
        f'<header><p class="eyebrow">jaxcl run</p><h1>{text(results["method"])} on {count}</h1>'
        f'<p class="path">{way.join(f"<bdi>{text(task)}</bdi>" for task in run.tasks)}</p>'
        f'<div class="facts">{"".join(f"<span>{fact}</span>" for fact in facts)}</div>{warning}{broken}</header>'
    )


def _matrices(run: RunData) -> str:
    parts = []
    measures = {"": run.results, **(run.results.get("further") or {})}
    for name, measured in measures.items():
        joined = {**measured, "tasks": run.tasks, "joint": run.results.get("joint", False)}
        if name:
            parts.append(f'<h3>{text(name)} <span class="muted">{_numbers(measured)}</span></h3>')
        parts.append(matrix_table(joined))
    metrics = text(", ".join(dict.fromkeys(str(metric) for metric in run.results["metric"])))
    if run.results.get("joint"):
        note = f"Score ({metrics}) on each task, before and after learning all tasks at once."
    else:
        note = (
            f"Score ({metrics}) on each task (column) after each task was learned (row). "
            "Framed: right after learning the task. Italic: before learning it."
        )
    if any(measured.get("deviation") or measured.get("initial_deviation") for measured in measures.values()):
        note += " ± standard deviation over repetitions of the measurement."
    return section("Every task after every task", *parts, note=note)


def _numbers(measured: Mapping[str, Any]) -> str:
    """The numbers of a further measure, on one line."""
    shown = [
        f"{title} {number(measured.get(name), signed=name in ('bwt', 'gain'))}"
        for name, title in (("op", "OP"), ("bwt", "BWT"), ("forgetting_rate", "forgetting rate"), ("gain", "gain"))
        if name in ("op", "bwt") or measured.get(name) is not None
    ]
    return ", ".join(shown)


def _retention(run: RunData) -> str:
    matrix = scores(run.results)
    if len(matrix) < 2:
        return ""
    picture = plots.retention(run.tasks, matrix, unit(run.results))
    return section(
        "Retention of each task",
        figure(picture),
        note="One panel per task. Solid: since it was learned; dotted: before. Grey: the other tasks.",
    )


def _losses(run: RunData) -> str:
    rows = [row for row in run.metrics if isinstance(row.get("step"), int | float)]
    if not rows:
        return ""
    bounds: list[tuple[float, str]] = []
    for last, row in zip([None, *rows], rows, strict=False):
        if last is None or last.get("task") != row.get("task"):
            bounds.append((float(last["step"]) if last else 0.0, _task_name(run, row.get("task"))))
    kinds = [str(kind) for kind in dict.fromkeys(row.get("kind", "task") for row in rows)]
    labels = {"task": "rows of the task", "memory": "rows from the memory", "general": "general rows"}
    curves = {labels.get(kind, kind): _curve(rows, "loss", kind) for kind in kinds}
    curves = {name: curve for name, curve in curves.items() if curve[0]}
    picture = figure(plots.loss(curves, bounds, "loss", "loss")) if curves else ""
    names = dict.fromkeys(name for row in rows for name in row if name not in _OWN)
    others = {
        f"{name} ({kind})" if len(kinds) > 1 else name: curve
        for name in names
        for kind in kinds
        if len((curve := _curve(rows, name, kind))[0]) > 1
    }
    more = plots.small_curves(others, [start for start, _ in bounds]) if others else ""
    return section(
        "Training",
        picture,
        *(f'<p class="warn">{text(line)}</p>' for line in watched(run.results)),
        details("Terms of the loss, norms, rates", figure(more)) if more else "",
        note="Means over the steps between two logged rows; dashed lines: start of a task.",
    )


def _curve(rows: list[dict[str, Any]], name: str, kind: str) -> tuple[list[float], list[float]]:
    """Steps and values of a quantity, with a gap (NaN) at the start of each task."""
    steps: list[float] = []
    values: list[float] = []
    task: object = None
    for row in rows:
        value = row.get(name)
        if row.get("kind", "task") != kind or not isinstance(value, int | float) or not np.isfinite(value):
            continue
        if steps and row.get("task") != task:
            steps.append(float(row["step"]))
            values.append(np.nan)
        task = row.get("task")
        steps.append(float(row["step"]))
        values.append(float(value))
    return steps, values


def _task_name(run: RunData, task: object) -> str:
    if run.results.get("joint"):
        return "all tasks"
    return run.tasks[task] if isinstance(task, int) and 0 <= task < len(run.tasks) else str(task)


def _samples(run: RunData) -> str:
    parts = [task_samples(run, index, opened=index == 0) for index in range(len(run.tasks))]
    return section(
        "What the model answers", *parts, note="Examples drawn from the latest evaluation, forgotten ones first."
    )


def _how(run: RunData) -> str:
    timing = {name: float(value) for name, value in (run.results.get("timing") or {}).items() if value}
    parts = []
    if timing:
        share = 100 * (goodput(timing) or 0.0)
        note = f"<p>Goodput {share:.0f}%: the share of the time that went into training steps that count.</p>"
        parts.append(f"<h3>Time</h3>{note}{_time_bar(timing)}")
    listing = _data_table(run)
    if listing:
        raw = f"<pre>{text(json.dumps(run.results['data'], indent=2, ensure_ascii=False))}</pre>"
        parts.append(f"<h3>Data</h3>{listing}{details('All counts', raw, printed=False)}")
    return section("How it ran", *parts)


def _time_bar(timing: Mapping[str, float]) -> str:
    total = sum(timing.values())
    ordered = sorted(timing.items(), key=lambda item: -item[1])
    colours = [f"var(--series-{index})" if index < 7 else "var(--muted)" for index in range(len(ordered))]
    bar = "".join(
        f'<i style="flex: {seconds / total:.5f} 1 0; background: {colour}" title="{text(name)}"></i>'
        for (name, seconds), colour in zip(ordered, colours, strict=True)
    )
    legend = "".join(
        f'<li><span class="key" style="background: {colour}"></span>{text(name)} '
        f'<span class="muted">{duration(seconds)}, {100 * seconds / total:.0f}%</span></li>'
        for (name, seconds), colour in zip(ordered, colours, strict=True)
    )
    return f'<div class="stack">{bar}</div><ul class="legend">{legend}</ul>'


def _data_table(run: RunData) -> str:
    """The table of the counts that all kinds of tasks have; `data` nests them by source."""
    rows = []
    steps = run.results.get("steps") or {}
    for name, described in (run.results.get("data") or {}).items():
        if not isinstance(described, Mapping):
            continue
        task = described.get("task", described)
        memory = described.get("memory") if isinstance(described.get("memory"), Mapping) else {}
        cut = [_total(task, key) for key in ("cut_examples", "cut_prompts", "cut_answers", "cut_passages")]
        found = [value for value in cut if value is not None]
        share = task.get("real_token_share")
        rows.append(
            [
                text(name),
                _count(steps.get(name) if isinstance(steps, Mapping) else None),
                _count(_total(task, "examples")),
                _count(_total(task, "tokens")),
                _count(sum(found) if found else None),
                f"{100 * share:.0f}%" if isinstance(share, int | float) else DASH,
                _count(memory.get("examples") if memory else None),
            ]
        )
    if not rows:
        return ""
    heads = ["Task", "Steps", "Examples", "Tokens", "Cut to fit", "Rows filled", "Remembered"]
    return table(heads, rows, numbers=range(1, len(heads)))


def _total(described: Mapping[str, Any], key: str) -> float | None:
    """The count at the top level, else the sum over the sources."""
    if isinstance(described.get(key), int | float):
        return float(described[key])
    below = described.get("sources")
    counts = [source[key] for source in below.values() if key in source] if isinstance(below, Mapping) else []
    return float(sum(counts)) if counts else None


def _count(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else DASH


def _configuration(run: RunData) -> str:
    versions = [[text(name), text(version)] for name, version in (run.results.get("versions") or {}).items()]
    extra = run.results.get("extra")
    return section(
        "Configuration and versions",
        details("config.yaml", f"<pre>{text(run.config)}</pre>") if run.config else "",
        details("Versions", table(["Package", "Version"], versions)) if versions else "",
        details("More results", f"<pre>{text(json.dumps(extra, indent=2, ensure_ascii=False))}</pre>") if extra else "",
    )
