"""Runs points that share compiled programs: a process that `benchmarks.frontier` starts, or alone.

echo '[{"testbed": "text", "order": "A", "name": "ewc", "method": "ewc", "options": {"strength": 100},
        "learning_rate": 1e-3, "seed": 0}]' | python -m benchmarks.frontier.worker
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.frontier.records import RECORDS, Point, append, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--work", type=Path, default=Path("runs/frontier"), help="folder for rows and tokenizers")
    parser.add_argument("--until", type=float, default=float("inf"), help="start no point after this time (Unix)")
    options = parser.parse_args()
    known = {record.point.key for record in read(options.records)}
    points = [point for one in json.load(sys.stdin) if (point := Point(**one)).key not in known]
    if not points or time.time() > options.until:
        return
    if others := {point.name for point in points if point.program != points[0].program}:
        raise SystemExit(
            f"points of one process share programs: {', '.join(sorted(others))} differ from {points[0].name} "
            "in testbed, order, method or options"
        )

    from benchmarks.frontier.point import Setting, measure
    from jaxcl.errors import UserError
    from jaxcl.training.compile import enable_compilation_cache

    enable_compilation_cache(os.environ.get("JAX_COMPILATION_CACHE_DIR") or options.work / "compiled")
    setting = Setting(points[0], options.work)
    for point in points:
        if time.time() > options.until:
            return
        try:
            results = measure(setting, point)
        except UserError as error:
            if error.exit_code != 1:
                raise
            results = {"failed": str(error)}  # it diverged: there is nothing to run again
        append(point, results, options.records)
        shown = {name: results.get(name) for name in ("final", "bwt", "learned", "drift", "failed")}
        cpu = results.get("seconds", {}).get("cpu")
        print(f"{point.testbed} {point.order} {point.name} {dict(point.options)} {point.learning_rate:g} "
              f"seed {point.seed}: {shown}, {cpu} s of processor time", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
