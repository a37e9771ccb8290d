"""Kills runs with SIGKILL at random points: `python -m tests.chaos --kills 100 --seed 1`; `make chaos`.

A run is started again until it ends, and then compared with one that nothing disturbed: params, state, matrix, memory,
stores, predictions and logged rows, bit by bit. With storage `url` its output is a URL, and its local folder is lost
with each kill. Prints where the kills fell, and adds them to `benchmarks/records/chaos`, which `--summary` sums up.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from pathlib import Path

from tests.chaos.campaign import METHODS, Campaign, Tally, environment, table
from tests.records import RECORDS, append, lines

STORAGES = ("folder", "url")


def main() -> int:
    """Runs the campaigns one after another; 1 if a run differs or did not end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="of all methods, processes and storages together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--processes", default="1,2", help="numbers of processes")
    parser.add_argument("--storage", default=",".join(STORAGES), help="`folder`, `url` or both")
    parser.add_argument("--out", type=Path, help="where runs go; default: a temporary folder")
    parser.add_argument("--reports", action="store_true", help="also write reports")
    parser.add_argument("--record", type=Path, default=RECORDS / "chaos", help="folder of the records")
    parser.add_argument("--summary", action="store_true", help="only print the sums of all records")
    options = parser.parse_args()
    if options.summary:
        table(summed(options.record))
        return 0
    out = options.out or Path(tempfile.mkdtemp(prefix="chaos"))
    os.environ.update(environment(out))
    counts = [int(count) for count in options.processes.split(",")]
    kinds = list(itertools.product(options.methods.split(","), counts, options.storage.split(",")))
    if unknown := {kind[2] for kind in kinds} - {*STORAGES}:
        parser.error(f"--storage {', '.join(unknown)}: allowed: {', '.join(STORAGES)}")
    tallies = {}
    for number, (method, count, storage) in enumerate(kinds):
        if not (kills := options.kills // len(kinds) + (number < options.kills % len(kinds))):
            continue
        folder = out / f"{method}{count}{storage}"
        campaign = Campaign(method, count, folder, remote=storage == "url", reports=options.reports)
        about = {"method": method, "processes": count, "storage": storage, "seed": options.seed + number}

        def record(one: Tally, about: dict[str, object] = about) -> None:
            if one.kills or one.wrong:
                append(options.record, {**about, **one.plain()})

        name = _name(about)
        tallies[name] = campaign.run(kills, options.seed + number, record)
        print(f"{name}: {tallies[name].kills} kills", *tallies[name].wrong, sep="\n  ", flush=True)
    table(tallies)
    return int(any(tally.wrong for tally in tallies.values()))


def summed(folder: Path) -> dict[str, Tally]:
    """What came of all recorded kills, by kind of run."""
    tallies: dict[str, Tally] = {}
    for line in lines(folder):
        tallies.setdefault(_name(line), Tally()).add(Tally.of(line))
    return dict(sorted(tallies.items()))


def _name(about: dict[str, object]) -> str:
    return (
        f"{about['method']}, {about['processes']} process{'es' if about['processes'] != 1 else ''}, {about['storage']}"
    )


if __name__ == "__main__":
    sys.exit(main())
