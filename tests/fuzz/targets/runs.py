"""Run folders: configurations, results, and what is beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.commands.show import show
from jaxcl.config import parse_config
from jaxcl.config.experiment import override
from jaxcl.config.file import dump_yaml
from jaxcl.evaluation.results import Results
from jaxcl.reporting.comparison import collect, comparison_table, read_comparison
from jaxcl.reporting.rebuild import rebuild
from jaxcl.reporting.report import write_report
from jaxcl.reporting.run_data import read_run
from jaxcl.run.folder import RunFolder
from jaxcl.training import trackers
from jaxcl.training.checksums import check_checksums, write_checksums
from jaxcl.training.sinks import JsonLines
from tests.fuzz.harness import Target
from tests.fuzz.targets.common import lines_of, made, text_of, written
from tests.fuzz.targets.stores import memory
from tests.tiny.runs import PAIRS, SEEKR

RESULTS: dict[str, Any] = {
    "method": "replay", "seed": 0, "tasks": ["a", "b"], "metric": ["accuracy", "accuracy"],
    "higher_is_better": [True, True], "matrix": [[50.0, None], [40.0, 60.0]], "initial": [1.0, 2.0], "finished": True,
    "further": {"other": {"metric": ["x", "x"], "higher_is_better": [True, False], "matrix": [[1.0, None]]}},
    "timing": {"training": 1.5}, "data": {"a": {"task": {"examples": 3}}}, "versions": {"jax": "1"},
    "steps": {"a": 3}, "seconds": 2.5, "op": 50.0, "bwt": -10.0, "fwt": 1.0, "gain": 48.5, "forgetting": 10.0,
}  # fmt: skip
METRICS = [
    {"step": step, "task": 0, "task_step": step, "kind": "task", "loss": 1.5, "steps": 1} for step in range(1, 5)
]
CONFIG = {**PAIRS, "method": SEEKR, "output": "x", "seed": 0}
PREDICTION = {
    "after": 0, "task": "a", "prompt": "p [image]", "prediction": "x", "answer": "y", "score": 1.0, "correct": False,
    "images": ["0123"],
}  # fmt: skip
ROUNDS = [
    {"kind": "round", "task": 0, "round": number, "clients": ["0", "1"], "refused": {"1": "gone"}, "bytes_down": 2048,
     "bytes_up": 1024, "update_norm": 0.5} for number in range(2)
]  # fmt: skip

_ORDERS = [{"first": last - 1, "last": last, "count": 3, "rows": {"a": [1, 7, last]}} for last in (4, 9)]
NOT_FINITE = {
    "message": "loss is nan", "task": "a", "skipped": 2, "orders": _ORDERS,
    "in_all_orders": {"count": 2, "rows": {"a": [1, 7]}},
}  # fmt: skip


def read_run_config(content: bytes, folder: Path) -> None:
    written(folder / "config.yaml", content)
    parse_config(RunFolder.open(folder).content())


def read_override(content: bytes, folder: Path) -> None:
    given = {"output": "x", **PAIRS, "tasks": [dict(task) for task in PAIRS["tasks"]], "method": dict(SEEKR)}
    given |= {name: dict(PAIRS[name]) for name in ("model", "training", "data", "optimizer")}
    changed = override(given, content.decode("utf-8", "surrogateescape").split("\n"))
    if "weights" not in changed and isinstance(method := changed.get("method"), dict) and method.get("name") == "seekr":
        parse_config(changed)


OVERRIDES = [
    b"seed=1",
    b"tasks.*.train=2\nmethod.layer_budget=1",
    b"model.rope_scaling={type: linear, factor: 2.0}",
    b"training.epochs=[1,2]\noptimizer.learning_rate=1e-3",
    b"output=runs/some where/a-b\nevaluation.batch_size=16\nmesh.data=2",
]


def read_results(content: bytes, folder: Path) -> None:
    path = written(folder / "results.json", content)
    written(folder / "metrics.jsonl", lines_of(METRICS))
    try:
        read_run(folder)
    finally:
        Results.read(path)


def beside_results(name: str) -> Callable[[bytes, Path], None]:
    def read(content: bytes, folder: Path) -> None:
        written(folder / "results.json", text_of(RESULTS))
        written(folder / name, content)
        read_run(folder)

    return read


def read_metrics(content: bytes, folder: Path) -> None:
    beside_results("metrics.jsonl")(content, folder)
    sink = JsonLines(folder / "metrics.jsonl", after=2)
    sink.write({"step": 3})
    sink.close()


def folder_with(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], None]:
    """Reads a run folder in which a file holds something else."""

    def reads(content: bytes, folder: Path) -> None:
        written(folder / "config.yaml", text_of({name: CONFIG[name] for name in ("tasks", "method", "seed", "output")}))
        written(folder / "results.json", text_of(RESULTS))
        written(folder / name, content)
        read(folder)

    return reads


def shown(folder: Path) -> None:
    show(folder).encode()


def read_compared(content: bytes, folder: Path) -> None:
    written(folder / "one" / "run" / "results.json", text_of(RESULTS))
    written(folder / "one" / "comparison.json", content)
    try:
        comparison_table(read_comparison(folder / "one"))
    finally:
        for place in (folder, folder / "one"):
            rebuild(place)


def compared() -> list[bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(folder / "run" / "results.json", text_of(RESULTS))
        plain = collect(folder, [folder / "run"])
        swept = collect(folder, [folder / "run"], {"keys": ["seed"], "settings": ["seed 0"], "failed": {}})
    return [text_of(plain), text_of(swept)]


def read_checksums(content: bytes, folder: Path) -> None:
    written(folder / "params" / "x", b"abc")
    written(folder / "checksums.json", content)
    check_checksums(folder)


def checksums() -> list[bytes]:
    with tempfile.TemporaryDirectory() as name:
        written(Path(name) / "params" / "x", b"abc")
        write_checksums(Path(name))
        content = (Path(name) / "checksums.json").read_bytes()
    return [content, content.replace(b" ", b" " * 40)]


def read_tracking(content: bytes, folder: Path) -> None:
    written(folder / "tracking.json", content)
    before = trackers._stored_id(folder, "wandb")
    trackers._store_id(folder, "mlflow", "x")
    assert trackers._stored_id(folder, "mlflow") == "x"
    assert trackers._stored_id(folder, "wandb") == before


def arrays() -> bytes:
    return made(lambda path: np.savez(path, mlp=np.ones((2, 3)), heads=np.ones(2)), "after0.npz")


def yaml_seeds() -> list[bytes]:
    return [text_of(CONFIG), dump_yaml(CONFIG).encode(), b"# c\nseed: 0x1f\noutput: &a x\nweights: *a\nmodel: {}\n"]


TARGETS: dict[str, Target] = {
    "config": Target(read_run_config, yaml_seeds, weight=2),
    "overrides": Target(read_override, lambda: OVERRIDES, weight=2),
    "results": Target(read_results, lambda: [text_of(RESULTS)]),
    "metrics": Target(read_metrics, lambda: [lines_of(METRICS), text_of(METRICS[0])]),
    "predictions": Target(
        beside_results("predictions/after0_task0_a.jsonl"),
        lambda: [text_of(PREDICTION)],
    ),
    "show_config": Target(folder_with("config.yaml", shown), yaml_seeds),
    "show_results": Target(folder_with("results.json", shown), lambda: [text_of(RESULTS)]),
    "show_metrics": Target(folder_with("metrics.jsonl", shown), lambda: [lines_of(METRICS[:2]), text_of(METRICS[0])]),
    "show_memory": Target(folder_with("memory.json", shown), lambda: [memory()]),
    "show_note": Target(
        folder_with("checkpoints/3/progress/metadata", shown),
        lambda: [text_of({"progress": {"task": 1, "phase": "learned"}, "mark": "after task 1"})],
    ),
    "report_results": Target(folder_with("results.json", write_report), lambda: [text_of(RESULTS)], weight=10),
    "report_metrics": Target(folder_with("metrics.jsonl", write_report), lambda: [lines_of(METRICS)], weight=40),
    "report_rounds": Target(folder_with("rounds.jsonl", write_report), lambda: [lines_of(ROUNDS)], weight=40),
    "report_predictions": Target(
        folder_with("predictions/after00_task00.jsonl", write_report), lambda: [text_of(PREDICTION)], weight=40
    ),
    "report_not_finite": Target(
        folder_with("not_finite.json", write_report), lambda: [text_of(NOT_FINITE)], weight=40
    ),
    "report_arrays": Target(folder_with("importance/after0.npz", write_report), lambda: [arrays()], weight=40),
    "comparison": Target(read_compared, compared, weight=40),
    "checksums": Target(read_checksums, checksums),
    "tracking": Target(read_tracking, lambda: [b'{"wandb": "1a2b", "mlflow": "ffff"}']),
    "importance": Target(beside_results("importance/after0.npz"), lambda: [arrays()]),
}  # fmt: skip
