"""Fuzzes readers at length: `python -m tests.fuzz --minutes 10`; `make fuzz MINUTES=10`.

Half of the inputs are mutations of the seeds, the others what coverage leads to; without atheris (`pip install -e
'.[fuzz]'`) all are mutations.
Each reader has a process and a folder of its own: `OUT/READER/crashes` keeps inputs that crash it, `OUT/READER/corpus`
those that reach new code, with which the next call begins. Counts are added to `benchmarks/records/fuzz`, which
`--summary` sums up.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.records import RECORDS, append, lines

ALL = "all"
GUIDED = importlib.util.find_spec("atheris") is not None
# The harness ends an input by the process's own time; this is for code that never comes back to Python.
_STUCK, _MEGABYTES = 60, 4096


def main() -> int:
    """Fuzzes the readers one after another and prints a table; 1 if there was a crash."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="readers; default: all")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all readers together")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--seed", type=int, default=0, help="of the mutations; 0: by the clock")
    parser.add_argument("--record", type=Path, default=RECORDS / "fuzz", help="folder of the records")
    parser.add_argument("--summary", action="store_true", help="only print the sums of all records")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.summary:
        print(*summed(options.record), sep="\n")
        return 0
    if options.one is not None:
        return _one(options.targets[0], options.one, options.out, options.seed)
    from tests.fuzz.targets import TARGETS

    names = options.targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"no reader {unknown[0]}; there are {', '.join(TARGETS)}")
    print(f"{'guided by coverage' if GUIDED else 'mutations of seeds; atheris is not installed'}", flush=True)
    seconds = 60 * options.minutes / len(names)
    seed = options.seed or time.time_ns() % 2**31
    total = failed = 0
    for name in names:
        command = [sys.executable, "-m", "tests.fuzz", name, "--one", str(seconds), "--out", str(options.out)]
        (options.out / name).mkdir(parents=True, exist_ok=True)
        note = options.out / name / "counts.json"
        note.unlink(missing_ok=True)
        with open(options.out / name / "log.txt", "w") as log:
            code = subprocess.run([*command, "--seed", str(seed)], stdout=log, stderr=log).returncode
        none = {"inputs": 0, "read": 0, "changed": 0, "seconds": 0.0, "line": name, "crashes": []}
        counts = json.loads(note.read_text()) if note.exists() else none
        ended = "" if code in (0, 1) else f"  ended with {code}, see {log.name}"
        if not (counts["changed"] or ended):
            ended = "  no changed input could be read: nothing behind the first check was tried"
        print(counts["line"] + ended, flush=True)
        del counts["line"]
        append(options.record, {"reader": name, **counts, "guided": GUIDED, "seed": seed, "ended": ended.strip()})
        for crash in counts["crashes"]:
            print(f"    {crash}", flush=True)
        total += counts["inputs"]
        failed += bool(counts["crashes"] or ended)
    print(f"{total:,} inputs, {failed} of {len(names)} readers with crashes; seed {seed}")
    return int(failed > 0)


def summed(folder: Path) -> Iterator[str]:
    """The lines of a table: what came of all recorded inputs, by reader."""
    sums: dict[str, dict[str, float]] = {}
    for line in lines(folder):
        counts = {key: line[key] for key in ("inputs", "read", "seconds")} | {"crashes": len(line["crashes"])}
        counts["crashes"] += bool(line["ended"])
        for name in (line["reader"], ALL):
            known = sums.setdefault(name, dict.fromkeys(counts, 0))
            sums[name] = {key: known[key] + value for key, value in counts.items()}
    yield "| reader | inputs | read | crashes | inputs per second of a core |"
    yield "|---|---|---|---|---|"
    for name, one in sorted(sums.items(), key=lambda pair: (pair[0] == ALL, pair[0])):
        rate = one["inputs"] / one["seconds"] if one["seconds"] else 0.0
        yield f"| {name} | {one['inputs']:,} | {one['read']:,} | {one['crashes']} | {rate:,.0f} |"


def _one(name: str, seconds: float, out: Path, seed: int) -> int:
    """Fuzzes one reader in this process."""
    if GUIDED:
        import atheris

        with atheris.instrument_imports(include=["jaxcl"]):
            from tests.fuzz import targets
    else:
        from tests.fuzz import targets
    from tests.fuzz.harness import Counts, feed
    from tests.fuzz.mutate import MOST, mutants

    target = targets.TARGETS[name]
    seeds = target.seeds()
    counts, until = Counts(seeds=set(seeds)), time.monotonic() + seconds
    corpus, crashes = out / name / "corpus", out / name / "crashes"
    corpus.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    known = [one for one in targets.KNOWN.get(name, list)() if len(one) < MOST]
    for content in (*seeds, *known):
        (corpus / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)

    def one(content: bytes) -> None:
        known = len(counts.crashes)
        feed(target, content, counts)
        if len(counts.crashes) > known:
            crashes.mkdir(exist_ok=True)
            (crashes / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)
        # atheris ends the process: what is known by then is in the file.
        if len(counts.crashes) > known or counts.inputs % 100 == 0 or time.monotonic() > until:
            # The process's own time: what else the machine does changes no rate.
            seconds_used = round(time.process_time() - started, 1)
            found = {"inputs": counts.inputs, "read": counts.read, "changed": counts.changed, "seconds": seconds_used}
            found |= {"crashes": list(counts.crashes)}
            (out / name / "counts.json").write_text(json.dumps({**found, "line": counts.line(name)}))

    if GUIDED:
        limits = [f"-max_total_time={int(seconds) + 1}", f"-timeout={_STUCK}", f"-rss_limit_mb={_MEGABYTES}"]
        sizes = [f"-max_len={MOST}", "-len_control=0"]
        where = [f"-artifact_prefix={out / name}/", f"-seed={seed}", str(corpus)]
        ours = mutants(seeds, seed)  # the known ones are in the corpus, and some are long

        def mutated(content: bytes, most: int, seed: int) -> bytes:
            # A reader with few branches says little about how far an input got, and the seeds leave its corpus.
            return next(ours)[:most] if seed % 2 else atheris.Mutate(content, most)

        atheris.Setup([sys.argv[0], *limits, *sizes, *where], one, custom_mutator=mutated)
        atheris.Fuzz()
    for content in mutants([path.read_bytes() for path in sorted(corpus.iterdir())], seed):
        one(content)
        if time.monotonic() > until:
            return int(bool(counts.crashes))
    return 1


if __name__ == "__main__":
    sys.exit(main())
