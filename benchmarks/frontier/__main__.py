"""Retention against learning: every method with the same budget of tuning, on testbeds that tell methods apart.

    JAXCL_DATA=data python -m benchmarks.frontier tune --testbed text --methods sequential,replay,ewc,das
    JAXCL_DATA=data python -m benchmarks.frontier report --testbed text --seeds 0,1,2,3,4
    python -m benchmarks.frontier summary --testbed text --order B --picture frontier.png
    python -m benchmarks.frontier summary --testbed text --order A --methods ewc,das --sensitivity sensitivity.png

`tune` runs a grid of learning rates and of each method's own knob on order A, scored on dev rows, goes beyond the
grid where the best setting lies at its edge, and completes the cross of learning rates and values around it; `report`
runs the best setting of each method on order B, scored on test rows, under several seeds; `summary` prints tables and
draws the frontier. Whatever has a record in `benchmarks/records/frontier` is not run again, so that both can be stopped
at any time and go on later. Other methods or options: `--method module:Class --options '{"strength": 100}' --name
mine`, with `--knob strength --values 10,100`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.frontier.figures import draw_frontier, draw_sensitivity
from benchmarks.frontier.methods import LEARNING_RATES, RIVALS, Rival, beyond, cross, tuning_points
from benchmarks.frontier.records import RECORDS, Point, Record, read
from benchmarks.frontier.summary import best_settings, tables
from benchmarks.frontier.testbeds import TESTBEDS


def run_points(points: Iterable[Point], options: argparse.Namespace) -> None:
    """Runs the points that have no record, in processes, those that take least time first."""
    records = list(read(options.records))
    known = {record.point.key for record in records}
    groups: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        if point.key not in known:
            groups[point.program].append(point)
    costs = _costs(records)
    ordered = sorted(groups.values(), key=lambda group: costs.get(group[0].name, 0.0))
    print(f"{sum(map(len, ordered))} points without a record, in {len(ordered)} groups", file=sys.stderr, flush=True)

    def work(group: list[Point]) -> int:
        if time.time() > options.until:
            return 0
        command = [sys.executable, "-m", "benchmarks.frontier.worker", "--until", str(options.until)]
        command += ["--records", str(options.records), "--work", str(options.work)]
        content = json.dumps([point.plain() for point in group])
        return subprocess.run(command, input=content.encode(), env=_environment(options.processes)).returncode

    with ThreadPoolExecutor(options.processes) as pool:
        failed = [group[0].name for group, code in zip(ordered, pool.map(work, ordered), strict=True) if code]
    if failed:
        raise SystemExit(f"failed: {', '.join(dict.fromkeys(failed))}")


def _costs(records: Sequence[Record]) -> dict[str, float]:
    """Mean processor seconds of a point, by name."""
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if "seconds" in record.results:
            found[record.point.name].append(record.results["seconds"]["cpu"])
    return {name: sum(values) / len(values) for name, values in found.items()}


def _environment(processes: int) -> dict[str, str]:
    """One thread of products per process where there are several, so that they do not wait for each other."""
    environment = {"JAX_PLATFORMS": "cpu", **os.environ}
    if processes > 1 and environment["JAX_PLATFORMS"] == "cpu":
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    return environment


def _rivals(options: argparse.Namespace) -> dict[str, Rival]:
    if options.method:
        values = [json.loads(value) for value in options.values.split(",")] if options.values else []
        return {
            options.name or options.method: Rival(options.method, json.loads(options.options), options.knob, values)
        }
    names = _names(options.methods)
    if unknown := set(names) - set(RIVALS):
        raise SystemExit(f"--methods: {', '.join(sorted(unknown))}; allowed: {', '.join(RIVALS)}, or use --method")
    return {name: RIVALS[name] for name in names}


def tune(options: argparse.Namespace) -> None:
    """The grid of each method, the next points where its best one lies at an edge, and the cross around the best."""
    rates, seeds = _floats(options.learning_rates), _seeds(options.seeds or "0")
    order, rivals = options.order or "A", _rivals(options)
    points = [
        point
        for name, rival in rivals.items()
        for point in tuning_points(options.testbed, name, rival, order=order, learning_rates=rates, seeds=seeds)
    ]
    run_points(points, options)
    for _ in range(options.extensions):
        run_points(_further(beyond, rivals, options, order, seeds), options)
    # A point of the cross may be better than the one that it is around.
    while more := _further(cross, rivals, options, order, seeds):
        run_points(more, options)
        if time.time() > options.until:
            break
    summary(options)


def _further(
    choose: Callable[[Point, Rival, list[Point]], list[Point]],
    rivals: Mapping[str, Rival],
    options: argparse.Namespace,
    order: str,
    seeds: Sequence[int],
) -> list[Point]:
    """The points around the best one of each method that have no record."""
    tuned = _records(options, order)
    known = {one.point.key for one in tuned}
    points = [
        dataclasses.replace(point, seed=seed)
        for name, best in best_settings(tuned).items()
        if name in rivals
        for point in choose(best, rivals[name], [one.point for one in tuned if one.point.name == name])
        for seed in seeds
    ]
    return [point for point in points if point.key not in known]


def report(options: argparse.Namespace) -> None:
    """The chosen setting of each method, on the order that nothing was chosen on."""
    tuned = _records(options, "A")
    names = set(_names(options.methods)) if options.methods else None
    chosen = [point for name, point in best_settings(tuned).items() if names is None or name in names]
    seeds = _seeds(options.seeds or "0,1,2,3,4")
    run_points([_at(point, options.order or "B", seed) for point in chosen for seed in seeds], options)
    summary(options)


def summary(options: argparse.Namespace) -> None:
    """Tables and the picture of an order."""
    order = options.order or {"report": "B", "tune": "A"}.get(options.command, "B")
    records = _records(options, order)
    if not records:
        raise SystemExit(f"no records of testbed {options.testbed}, order {order}")
    if options.methods:
        shown = {*_names(options.methods), options.reference}
        records = [one for one in records if one.point.name in shown]
    print(tables(records, reference=options.reference))
    if options.picture:
        print(draw_frontier(records, options.picture))
    if options.sensitivity:
        print(draw_sensitivity(records, RIVALS, options.sensitivity))


def _records(options: argparse.Namespace, order: str) -> list[Record]:
    return [one for one in read(options.records) if (one.point.testbed, one.point.order) == (options.testbed, order)]


def _at(point: Point, order: str, seed: int) -> Point:
    return dataclasses.replace(point, order=order, seed=seed)


def _names(text: str) -> list[str]:
    """Names between commas, which may have commas in brackets themselves."""
    return re.split(r",(?![^(]*\))", text)


def _floats(text: str) -> list[float]:
    return [float(value) for value in text.split(",")]


def _seeds(text: str) -> list[int]:
    return [int(value) for value in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tune", "report", "summary"))
    parser.add_argument("--testbed", choices=tuple(TESTBEDS), default="text")
    parser.add_argument("--order", default="", help="A or B, or tasks; default: A for tune, else B")
    parser.add_argument("--methods", default="", help="names, separated by commas; default for report: all tuned ones")
    parser.add_argument("--method", default="", help="one method instead, by its registered name or module:Class")
    parser.add_argument("--name", default="", help="its name in tables and records")
    parser.add_argument("--options", default="{}", help="its fixed options, as JSON")
    parser.add_argument("--knob", default="", help="its own knob")
    parser.add_argument("--values", default="", help="values of the knob, JSON separated by commas")
    parser.add_argument("--learning-rates", default=",".join(map(str, LEARNING_RATES)))
    parser.add_argument("--extensions", type=int, default=2, help="how often to go beyond an edge that the best is on")
    parser.add_argument("--seeds", default="", help="default: 0 for tune, 0,1,2,3,4 for report")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no point after this time")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--work", type=Path, default=Path("runs/frontier"), help="folder for rows and tokenizers")
    parser.add_argument("--reference", default="sequential", help="method that others are compared with")
    parser.add_argument("--picture", type=Path, help="PNG of the frontier")
    parser.add_argument("--sensitivity", type=Path, help="PNG of the final mean by learning rate and knob")
    options = parser.parse_args()
    if options.command == "tune" and not (options.methods or options.method):
        own = (None, TESTBEDS[options.testbed].kind)
        options.methods = ",".join(name for name, rival in RIVALS.items() if rival.kind in own)
    options.until = time.time() + 60 * options.minutes
    {"tune": tune, "report": report, "summary": summary}[options.command](options)


if __name__ == "__main__":
    main()
