"""What records say: the chosen setting of each method, and tables with paired differences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.frontier.records import Point, Record
from benchmarks.frontier.testbeds import TESTBEDS
from benchmarks.recorded import table
from jaxcl.reporting import frontier
from jaxcl.reporting.intervals import Interval, mean_interval, paired_interval

#: Field, heading, whether more is better (`None`: as the score), factor, digits of the table.
COLUMNS: tuple[tuple[str, str, bool | None, float], ...] = (
    ("final", "final", None, 1.0),
    ("bwt", "BWT", True, 1.0),
    ("anytime", "anytime", None, 1.0),
    ("learned", "learned", None, 1.0),
    ("drift", "drift of general text, nats", False, 1.0),
    ("divergence", "KL from the start, nats", False, 1.0),
    ("kept_bytes", "kept, MB", False, 1e-6),
    ("cpu", "processor, s", False, 1.0),
)


def value(record: Record, name: str) -> float | None:
    """A measurement as one number."""
    results = record.results
    if name == "cpu":
        return float(results["seconds"]["cpu"])
    if name == "divergence":
        each = results["divergence"]
        return sum(each) / len(each) if each else None
    return results[name]


def by_setting(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """Records by name and setting; settings of which a run failed are left out."""
    grouped: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        grouped[record.point.name][record.point.setting].append(record)
    return {
        name: {setting: own for setting, own in settings.items() if not any("failed" in one.results for one in own)}
        for name, settings in grouped.items()
    }


def best_settings(records: Sequence[Record]) -> dict[str, Point]:
    """A point of the setting with the best final mean of each name, over the seeds that most settings have.

    Args:
      records: of one testbed and order.
    """
    found = {}
    for name, settings in by_setting(records).items():
        if not settings:
            continue
        most = max(map(len, settings.values()))
        whole = [own for own in settings.values() if len(own) == most]
        sign = 1 if TESTBEDS[whole[0][0].point.testbed].higher_is_better else -1
        best = max(whole, key=lambda own: sign * (_interval(own, "final").mean or 0.0))
        found[name] = best[0].point
    return found


def tables(records: Sequence[Record], *, reference: str) -> str:
    """Markdown: the best setting of each name, its differences from the reference, and all settings.

    Args:
      records: of one testbed and order.
      reference: name that differences are taken from.
    """
    grouped, best = by_setting(records), best_settings(records)
    testbed = TESTBEDS[records[0].point.testbed]
    digits = 3 if testbed.kind == "text" else 1
    chosen = {name: grouped[name][point.setting] for name, point in best.items()}
    heads = ["method", "setting", "seeds", *(title for _, title, _, _ in COLUMNS)]
    rows = [[f"`{name}`", *_cells(own, digits)] for name, own in chosen.items()]
    parts = [f"Best setting of each method ({_unit(testbed.kind)}; ± half of a 95% interval)", table(heads, rows)]
    if reference in chosen and len(chosen) > 1:
        parts += [
            f"Better than `{reference}` by, paired over seeds (* the 95% interval excludes 0)",
            table(
                ["method", *(title for _, title, _, _ in COLUMNS[:6])],
                [
                    [f"`{name}`", *(_difference(own, chosen[reference], column, digits) for column in COLUMNS[:6])]
                    for name, own in chosen.items()
                    if name != reference
                ],
            ),
        ]
    if any(len(settings) > 1 for settings in grouped.values()):
        rows = [[f"`{name}`", *_cells(own, digits)] for name, every in grouped.items() for own in every.values()]
        parts += ["All settings", table(heads, rows)]
    failed = [record for record in records if "failed" in record.results]
    parts += [f"failed: `{one.point.name}` {_words(one.point)}: {one.results['failed']}" for one in failed]
    return "\n\n".join(parts)


def _interval(records: Sequence[Record], name: str, factor: float = 1.0) -> Interval:
    known = [found for one in records if (found := value(one, name)) is not None]
    return mean_interval([factor * found for found in known])


def _cells(records: Sequence[Record], digits: int) -> list[str]:
    cells = [_words(records[0].point), str(len(records))]
    for name, _, _, factor in COLUMNS:
        places = {"kept_bytes": 2, "cpu": 0, "drift": 3, "divergence": 3}.get(name, digits)
        cells.append(frontier.words(_interval(records, name, factor), signed=name == "bwt", digits=places))
    return cells


def _difference(own: Sequence[Record], other: Sequence[Record], column: tuple[str, str, bool | None, float],
                digits: int) -> str:  # fmt: skip
    name, _, more, _ = column
    better = TESTBEDS[own[0].point.testbed].higher_is_better if more is None else more
    first, second = ({one.point.seed: found for one in each if (found := value(one, name)) is not None}
                     for each in (own, other))  # fmt: skip
    interval = paired_interval(first, second) if better else paired_interval(second, first)
    places = 3 if name in ("drift", "divergence") else digits
    return frontier.words(interval, signed=True, digits=places) + (" *" if interval.clear else "")


def _words(point: Point) -> str:
    options = ", ".join(f"{key} {_flat(option)}" for key, option in point.options.items())
    return f"{point.learning_rate:g}{'; ' if options else ''}{options}"


def _flat(option: Any) -> str:
    if isinstance(option, Mapping):
        return "(" + ", ".join(f"{key} {_flat(item)}" for key, item in option.items()) + ")"
    return f"{option:g}" if isinstance(option, float) else str(option)


def _unit(kind: str) -> str:
    return "nats per token, less is better" if kind == "text" else "percent right"
