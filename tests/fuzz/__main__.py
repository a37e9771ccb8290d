"""Fuzzes readers at length: `python -m tests.fuzz --minutes 10`; `make fuzz MINUTES=10`.

Coverage guides it if atheris is installed (`pip install -e '.[fuzz]'`); otherwise inputs are mutations of the seeds.
Each reader has a process and a folder of its own: `OUT/READER/crashes` keeps inputs that crash it, `OUT/READER/corpus`
those that reach new code, with which the next call begins.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

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
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
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
        counts = json.loads(note.read_text()) if note.exists() else {"inputs": 0, "line": name, "crashes": []}
        ended = "" if code in (0, 1) else f"  ended with {code}, see {log.name}"
        print(counts["line"] + ended, flush=True)
        for crash in counts["crashes"]:
            print(f"    {crash}", flush=True)
        total += counts["inputs"]
        failed += bool(counts["crashes"] or ended)
    print(f"{total:,} inputs, {failed} of {len(names)} readers with crashes; seed {seed}")
    return int(failed > 0)


def _one(name: str, seconds: float, out: Path, seed: int) -> int:
    """Fuzzes one reader in this process."""
    if GUIDED:
        import atheris

        with atheris.instrument_imports(include=["jaxcl"]):
            from tests.fuzz import targets
    else:
        from tests.fuzz import targets
    from tests.fuzz.harness import Counts, feed
    from tests.fuzz.mutate import mutants

    target, counts, until = targets.TARGETS[name], Counts(), time.monotonic() + seconds
    corpus, crashes = out / name / "corpus", out / name / "crashes"
    corpus.mkdir(parents=True, exist_ok=True)
    for content in target.seeds():
        (corpus / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)

    def one(content: bytes) -> None:
        known = len(counts.crashes)
        feed(target, content, counts)
        if len(counts.crashes) > known:
            crashes.mkdir(exist_ok=True)
            (crashes / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)
        # atheris ends the process: what is known by then is in the file.
        if len(counts.crashes) > known or counts.inputs % 100 == 0 or time.monotonic() > until:
            content_of = {"inputs": counts.inputs, "line": counts.line(name), "crashes": list(counts.crashes)}
            (out / name / "counts.json").write_text(json.dumps(content_of))

    if GUIDED:
        limits = [f"-max_total_time={int(seconds) + 1}", f"-timeout={_STUCK}", f"-rss_limit_mb={_MEGABYTES}"]
        where = [f"-artifact_prefix={out / name}/", f"-seed={seed}", "-max_len=65536", str(corpus)]
        atheris.Setup([sys.argv[0], *limits, *where], one)
        atheris.Fuzz()
    for content in mutants([path.read_bytes() for path in sorted(corpus.iterdir())], seed):
        one(content)
        if time.monotonic() > until:
            return int(bool(counts.crashes))
    return 1


if __name__ == "__main__":
    sys.exit(main())
