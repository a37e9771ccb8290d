"""Four clients with different data: each alone, federated, and all their rows in one place, by method and seed.

    python -m benchmarks.federated run --methods sequential,das,seekr,replay --seeds 0,1,2
    python -m benchmarks.federated run --methods sequential --ways federated --noise 0.5
    python -m benchmarks.federated run --testbed files
    python -m benchmarks.federated summary

`--testbed tables`: the model and the two embedded tasks of `quickstart_federated`. `--testbed files`: the small decoder
of the benchmark files and four instruction tasks, two of them formed from those files (see `benchmarks.frontier`). Rows
are divided by shares of each answer drawn from Dirichlet(0.3). All ways see as many rows: alone, every client trains as
many steps as in the federated run; in one place, a step has the rows of all clients. Whatever has a record in
`benchmarks/records/federated` is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.frontier.testbeds import TESTBEDS as FRONTIER
from benchmarks.recorded import table
from jaxcl.config import ExperimentConfig, find_config, parse_config
from jaxcl.config.experiment import override
from jaxcl.config.file import read_yaml
from jaxcl.evaluation.results import Results
from jaxcl.run.components import build
from jaxcl.run.federation import check_federated, federate, parts_of, whole_tasks
from jaxcl.run.folder import RunFolder
from jaxcl.run.sequence import TaskSequence
from jaxcl.training.checkpoint import Checkpoints

RECORDS = Path(__file__).parent / "records" / "federated"
WAYS = ("alone", "federated", "centralised")
CLIENTS, ALPHA = 4, 0.3
_MEMORY = {"replay": {"fraction": 0.05, "every": 4}}


@dataclasses.dataclass(frozen=True)
class Testbed:
    """What clients learn.

    Attributes:
      methods: options of each method.
      content: the configuration's plain values, for a folder that may get rows.
      rounds: per task.
      rows: training rows per task, of all clients together; None: all.
    """

    methods: dict[str, dict[str, Any]]
    content: Callable[[Path], dict[str, Any]]
    rounds: int
    rows: int | None


def tables(_: Path) -> dict[str, Any]:
    """The quickstart."""
    return read_yaml(find_config("quickstart_federated"))


def files(folder: Path) -> dict[str, Any]:
    """Instruction tasks of the frontier, for a model that knows some English."""
    content = FRONTIER["instruction"].config(("relation", "chemprot", "number", "category"), "test", {}, folder)
    content["training"].pop("steps")  # rounds times steps
    content["optimizer"] = {"learning_rate": 1e-3, "schedule": "linear", "warmup": 0.1}
    return content


TESTBEDS = {
    "tables": Testbed(
        {
            "sequential": {},
            "das": {"general_knowledge": False, "importance_examples": 128},  # from scratch: there is none
            "seekr": {"layer_budget": 2, "head_budget": 6, "query_budget": 16, "store_logits": 64, **_MEMORY},
            "replay": _MEMORY,
        },
        tables,
        rounds=8,
        rows=1200,
    ),
    "files": Testbed(
        {
            "sequential": {},
            "das": {"importance_examples": 128},
            "seekr": {"layer_budget": 3, "head_budget": 8, "store_logits": 64, **_MEMORY},
            "replay": _MEMORY,
        },
        files,
        rounds=5,
        rows=None,
    ),
}


def configured(method: str, seed: int, output: Path, options: argparse.Namespace, **federated: Any) -> ExperimentConfig:
    """The configuration of a run."""
    testbed = TESTBEDS[options.testbed]
    section = {"clients": CLIENTS, "alpha": ALPHA, "rounds": options.rounds, "steps": options.steps, **federated}
    changes = {"method": {"name": method, **testbed.methods[method]}, "federated": section, "evaluation.before": False}
    changes |= {"seed": seed, "output": str(output), "training.checkpoint_every": 0, "evaluation.limit": options.limit}
    changes["training.batch_size"] = 16 * CLIENTS if section["clients"] == 1 else 16
    if options.rows is not None:
        changes["tasks.*.train"] = options.rows
    content = testbed.content(options.work)
    return parse_config(override(content, [f"{key}={json.dumps(value)}" for key, value in changes.items()]))


def measured(method: str, way: str, seed: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What a run finds: a record, or alone one per client."""
    folder = options.work / f"{options.testbed}-{method}-{way}-{seed}-{options.noise}"
    shutil.rmtree(folder, ignore_errors=True)
    if way == "alone":
        config = configured(method, seed, folder, options)
        for client in range(CLIENTS):
            yield {"client": client, **_scores(alone(config, client))}
        return
    privacy = {"clip": options.clip, "noise_multiplier": options.noise} if options.noise is not None else None
    federated: dict[str, Any] = {"clients": 1, "alpha": None} if way == "centralised" else {"privacy": privacy}
    results = federate(configured(method, seed, folder, options, **federated)).results
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    sent = {name: sum(row[name] for row in rows) for name in ("bytes_up", "bytes_down")}
    shared = sum(row["bytes_up"] + row["bytes_down"] for row in rows if row["kind"] == "shared")
    epsilon = results.extra.get("federated", {}).get("epsilon")
    yield {**_scores(results), **sent, "bytes_shared": shared, "rounds": len(rows), "epsilon": epsilon}


def alone(config: ExperimentConfig, client: int) -> Results:
    """A client that learns from its own rows only, evaluated on all tasks' rows."""
    settings = check_federated(config)
    folder = RunFolder(Path(config.output) / str(client))
    with contextlib.ExitStack() as stack:
        folder.claim(config.plain())
        stack.callback(folder.release)
        own = parts_of(build(whole_tasks(config, settings), folder), settings, client, folder)
        checkpoints = stack.enter_context(Checkpoints(folder.checkpoints))
        return TaskSequence(own, folder, checkpoints).run()


def _scores(results: Results) -> dict[str, Any]:
    names = ("op", "bwt", "forgetting", "matrix", "seconds", "versions")
    return {name: getattr(results, name) for name in names}


def read(records: Path) -> list[dict[str, Any]]:
    """All records."""
    return [json.loads(line) for path in sorted(records.glob("*.jsonl")) for line in path.read_text().splitlines()]


def run(options: argparse.Namespace) -> None:
    """Runs what has no record."""
    keys = ("testbed", "method", "way", "seed", "rounds_per_task", "steps", "rows", "noise", "clip")
    known = {tuple(one[key] for key in keys) for one in read(options.records)}
    options.records.mkdir(parents=True, exist_ok=True)
    for seed in map(int, options.seeds.split(",")):
        for method in options.methods.split(","):
            for way in options.ways.split(","):
                sizes = (options.rounds, options.steps, options.rows, options.noise, options.clip)
                values = (options.testbed, method, way, seed, *sizes)
                if values in known:
                    continue
                started = time.time()
                found = [
                    {**dict(zip(keys, values, strict=True)), **one} for one in measured(method, way, seed, options)
                ]
                with (options.records / f"{options.testbed}-{method}.jsonl").open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(one) + "\n" for one in found)
                scores = ", ".join(f"{one['op']:.1f}" for one in found)
                print(f"{method} {way} seed {seed}: {scores} ({time.time() - started:.0f} s)", flush=True)


def summary(options: argparse.Namespace) -> None:
    """Prints a table: mean and deviation over seeds; alone, of the mean over clients."""
    groups: dict[tuple[Any, ...], dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for one in read(options.records):
        groups[one["testbed"], one["method"], one["way"], one["noise"]][one["seed"]].append(one)
    head = [
        "testbed",
        "method",
        "way",
        "noise",
        "seeds",
        "OP",
        "BWT",
        "MB sent, both ways",
        "of these shared by the method, MB",
    ]
    rows = []
    for (testbed, method, way, noise), seeds in sorted(groups.items(), key=str):
        cells = []
        for name in ("op", "bwt"):
            means = [statistics.fmean(one[name] for one in found) for found in seeds.values()]
            deviation = statistics.stdev(means) if len(means) > 1 else 0.0
            cells.append(f"{statistics.fmean(means):.1f} ± {deviation:.1f}")
        sent = ["", ""]
        if way == "federated":  # one client that has all rows sends nothing to nobody
            first = next(iter(seeds.values()))[0]
            megabytes = (first["bytes_up"] + first["bytes_down"], first["bytes_shared"])
            sent = [f"{count / 1e6:.2f}" for count in megabytes]
        rows.append(
            [testbed, f"`{method}`", way, "" if noise is None else f"{noise:g}", str(len(seeds)), *cells, *sent]
        )
    print(table(head, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "summary"])
    parser.add_argument("--testbed", choices=list(TESTBEDS), default="tables")
    parser.add_argument("--methods", default="sequential,das,seekr,replay")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, help="per task; default: 8 for tables, 5 for files")
    parser.add_argument("--steps", type=int, default=20, help="per round")
    parser.add_argument(
        "--rows",
        type=int,
        help="training rows per task, of all clients together; default: 1200 for tables, all for files",
    )
    parser.add_argument("--limit", type=int, default=96, help="rows that a task is scored on")
    parser.add_argument("--noise", type=float, help="DP-FedAvg with this noise multiplier")
    parser.add_argument("--clip", type=float, default=0.5, help="largest norm of an update, with --noise")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--work", type=Path, default=Path("runs/federated"), help="folder for runs")
    options = parser.parse_args()
    testbed = TESTBEDS[options.testbed]
    options.rounds = options.rounds or testbed.rounds
    options.rows = options.rows or testbed.rows
    {"run": run, "summary": summary}[options.what](options)


if __name__ == "__main__":
    main()
