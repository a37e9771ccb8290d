"""Run folders: configurations, results, and what is beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.config import parse_config
from jaxcl.config.experiment import override
from jaxcl.config.file import dump_yaml
from jaxcl.evaluation.results import Results
from jaxcl.reporting.run_data import read_run
from jaxcl.run.folder import RunFolder
from jaxcl.training.sinks import JsonLines
from tests.fuzz.harness import Target
from tests.fuzz.targets.common import lines_of, made, text_of, written
from tests.tiny.runs import PAIRS, SEEKR

RESULTS: dict[str, Any] = {
    "method": "replay", "seed": 0, "tasks": ["a", "b"], "metric": ["accuracy", "accuracy"],
    "higher_is_better": [True, True], "matrix": [[50.0, None], [40.0, 60.0]], "initial": [1.0, 2.0], "finished": True,
    "further": {"other": {"metric": ["x", "x"], "higher_is_better": [True, False], "matrix": [[1.0, None]]}},
    "timing": {"training": 1.5}, "data": {"a": {"task": {"examples": 3}}}, "versions": {"jax": "1"},
    "steps": {"a": 3}, "seconds": 2.5,
}  # fmt: skip
METRICS = [
    {"step": step, "task": 0, "task_step": step, "kind": "task", "loss": 1.5, "steps": 1} for step in range(1, 5)
]


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


def arrays() -> bytes:
    return made(lambda path: np.savez(path, mlp=np.ones((2, 3)), heads=np.ones(2)), "after0.npz")


def yaml_seeds() -> list[bytes]:
    content = {**PAIRS, "method": SEEKR, "output": "x"}
    return [text_of(content), dump_yaml(content).encode(), b"# c\nseed: 0x1f\noutput: &a x\nweights: *a\nmodel: {}\n"]


TARGETS: dict[str, Target] = {
    "config": Target(read_run_config, yaml_seeds, weight=2),
    "overrides": Target(read_override, lambda: OVERRIDES, weight=2),
    "results": Target(read_results, lambda: [text_of(RESULTS)]),
    "metrics": Target(read_metrics, lambda: [lines_of(METRICS), text_of(METRICS[0])]),
    "predictions": Target(
        beside_results("predictions/after0_task0_a.jsonl"),
        lambda: [text_of({"after": 0, "task": "a", "prompt": "p", "prediction": "x", "score": 1.0})],
    ),
    "importance": Target(beside_results("importance/after0.npz"), lambda: [arrays()]),
}  # fmt: skip
