"""Kills runs with SIGKILL at random points: `python -m tests.chaos --kills 100 --seed 1`; `make chaos`.

A run is started again until it ends, and then compared with one that nothing disturbed: params, state, matrix, memory,
stores, predictions and logged rows, bit by bit. Prints where the kills fell.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.chaos.campaign import METHODS, Campaign, environment, table


def main() -> int:
    """Runs the campaigns one after another; 1 if a run differs or did not end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="of all methods and processes together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--processes", default="1,2", help="numbers of processes")
    parser.add_argument("--out", type=Path, help="where runs go; default: a temporary folder")
    parser.add_argument("--reports", action="store_true", help="also write reports")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="chaos"))
    os.environ.update(environment(out))
    kinds = [(method, int(count)) for method in options.methods.split(",") for count in options.processes.split(",")]
    tallies = {}
    for number, (method, count) in enumerate(kinds):
        kills = options.kills // len(kinds) + (number < options.kills % len(kinds))
        campaign = Campaign(method, count, out / f"{method}{count}", reports=options.reports)
        name = f"{method}, {count} process{'es' if count > 1 else ''}"
        tallies[name] = campaign.run(kills, options.seed + number)
        print(f"{name}: {tallies[name].kills} kills", *tallies[name].wrong, sep="\n  ", flush=True)
    table(tallies)
    return int(any(tally.wrong for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
