"""Run folders as real runs leave them, with invented numbers, for tests and for looking at reports."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.evaluation.results import (
    Measure,
    Results,
    installed_versions,
    measure,
    write_predictions,
    write_tables,
)
from jaxcl.functional.matrix import ContinualMatrix

NAMES = [
    "category", "direction", "number", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "20Minuten",
    "task1510_evalution_relation_extraction", "task363", "task181", "task073", "task748", "task002",
]  # fmt: skip
KEEP = {"sequential": 0.35, "replay": 0.7, "das": 0.85, "seekr": 0.93, "joint": 1.0}


def make_matrix(tasks: int, method: str, seed: int, *, future: bool = True) -> ContinualMatrix:
    rng = np.random.default_rng((seed, len(method), tasks))
    peak = 60 + 35 * np.random.default_rng(tasks).random(tasks)
    matrix = ContinualMatrix.empty(tasks, [True] * tasks, joint=method == "joint")
    start = 2 + 8 * rng.random(tasks)
    for task in range(tasks):
        matrix = matrix.record(-1, task, start[task])
    if method == "joint":
        for task in range(tasks):
            matrix = matrix.record(0, task, peak[task] + rng.normal(0, 1))
        return matrix
    keep = KEEP.get(method, 0.6)
    for row in range(tasks):
        for task in range(min(row + 2, tasks) if future else row + 1):
            level = peak[task] * keep ** ((row - task) ** 0.6) if task <= row else start[task] + 5 * rng.random()
            matrix = matrix.record(row, task, float(np.clip(level + rng.normal(0, 1.5), 0, 100)))
    return matrix


def make_run(
    folder: Path, method: str = "seekr", *, tasks: int = 3, seed: int = 0, names: list[str] | None = None
) -> Path:
    """A finished run; `das` gets text domains with perplexity and end tasks, the others instruction tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (names or NAMES)[:tasks]
    rng = np.random.default_rng(seed)
    matrix = make_matrix(tasks, method, seed)
    text = method == "das"
    further: dict[str, Measure] = {}
    metric = ["accuracy"] * tasks
    if text:
        metric = ["token_accuracy"] * tasks
        lists = [[None if s is None else float(np.exp(5 - s / 30)) for s in row] for row in matrix.rows()]
        perplexity = ContinualMatrix.from_lists(lists, None, [False] * tasks)
        further["perplexity"] = Measure(**measure(perplexity, ["perplexity"] * tasks))
    steps = 120
    Results(
        method=method,
        seed=seed,
        tasks=names,
        joint=method == "joint",
        finished=True,
        further=further,
        seconds=83.4,
        timing={"training": 51.2, "evaluation": 19.9, "method": 8.4, "checkpoints": 2.1, "setup": 1.4, "data": 0.4},
        task_seconds=[],
        steps=dict.fromkeys(names, steps),
        parameters=4_213_760,
        stored_bytes=182_340 if method == "seekr" else 0,
        device="1 x cpu",
        data={name: _described(name, rng, first=index == 0) for index, name in enumerate(names)},
        versions=installed_versions(),
        **measure(matrix, metric),
    ).write(folder / "results.json")
    _write_config(folder, method, names)
    _write_metrics(folder, method, tasks, steps, rng)
    if not text:
        _write_predictions(folder, matrix, names, rng)
    tables = das_tables(tasks, rng) if method == "das" else seekr_tables(tasks, rng) if method == "seekr" else {}
    if tables:
        write_tables(folder / "importance", tasks - 1, tables)
    return folder


def das_tables(tasks: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    tables = {}
    for kind, units in {"heads": 12, "intermediate": 512, "output": 128}.items():
        domains = np.abs(np.tanh(rng.normal(0, 1, (tasks + 1, 4, units)))).astype(np.float32)
        tables[f"importance_{kind}"] = domains.max(axis=0)
        tables[f"domains_{kind}"] = domains
    return tables


def seekr_tables(tasks: int, rng: np.random.Generator, layers: int = 6, heads: int = 8) -> dict[str, np.ndarray]:
    sensitivity = rng.dirichlet(np.ones(heads) * 2, (tasks, layers)).astype(np.float32)
    forgettability = rng.exponential(0.01, (tasks, layers, heads)).astype(np.float32)
    importance = sensitivity.sum(axis=0) * forgettability.sum(axis=0)
    selected = np.zeros((tasks, layers, heads), bool)
    for task in range(tasks):
        score = sensitivity[: task + 1].sum(axis=0) * forgettability[: task + 1].sum(axis=0)
        selected[task] = score >= np.sort(score.ravel())[-12]
    return {
        "sensitivity": sensitivity,
        "forgettability": forgettability,
        "importance_heads": importance,
        "selected_heads": selected,
    }


def _described(name: str, rng: np.random.Generator, *, first: bool) -> dict[str, Any]:
    source = {"examples": 2400, "tokens": int(rng.integers(40_000, 90_000)), "cut_prompts": 3, "cut_answers": 0}
    task = {
        "examples": 2400,
        "batch_size": 32,
        "steps_per_epoch": 75,
        "shapes": [[80, 16]],
        "real_token_share": 0.71,
        "sources": {name: source},
    }
    if first:
        return task
    memory = {"examples": 48, "batch_size": 32, "steps_per_epoch": 2, "real_token_share": 0.7, "sources": {}}
    return {"steps_per_epoch": 77, "memory_steps_per_epoch": 2, "task": task, "memory": memory}


def _write_config(folder: Path, method: str, names: list[str]) -> None:
    lines = ["seed: 0", f"output: {folder.name}", "method:", f"  name: {method}", "tasks:"]
    lines += [f"- name: {json.dumps(name)}\n  source: stdlib:unicode_category" for name in names]
    (folder / "config.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_metrics(folder: Path, method: str, tasks: int, steps: int, rng: np.random.Generator) -> None:
    rows = []
    for task in range(1 if method == "joint" else tasks):
        for step in range(5, steps + 1, 5):
            kinds = ["task", "memory"] if method in ("seekr", "replay") and task and step % 20 == 0 else ["task"]
            for kind in kinds:
                level = 4.2 * np.exp(-step / 25) + 0.4 + 0.06 * rng.normal()
                row = {
                    "step": task * steps + step,
                    "task": task,
                    "task_step": step,
                    "kind": kind,
                    "steps": 5,
                    "seconds": 1.1,
                    "tokens_per_second": 20_000 + 500 * rng.normal(),
                    "loss": level if kind == "task" else level / 2 + 0.3,
                    "term/loss": level,
                    "grad_norm": 1 + rng.random(),
                    "param_norm": 40.0 + step / 50,
                    "update_norm": 0.03 + 0.01 * rng.random(),
                    "learning_rate": 1e-3 * (1 - step / steps),
                    "tokens": 1800.0,
                }
                if kind == "memory" and method == "seekr":
                    row["term/attention"] = 0.002 * rng.random()
                rows.append(row)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def _write_predictions(folder: Path, matrix: ContinualMatrix, names: list[str], rng: np.random.Generator) -> None:
    words = ["uppercase letter", "lowercase letter", "decimal number", "math symbol", "left to right", "seven", "½"]
    examples = [
        [(f"What is the category of LATIN SMALL LETTER {number:04X}?\nAnswer:", words[(number * 7 + task) % 7])
         for number in range(40)]
        for task in range(len(names))
    ]  # fmt: skip
    for row, scores in enumerate(matrix.rows()):
        for task, score in enumerate(scores):
            if score is None:
                continue
            right = rng.random(40) < score / 100
            lines = [
                {
                    "prompt": prompt,
                    "prediction": answer if ok else words[int(rng.integers(7))] + " ",
                    "answer": answer,
                    "score": 100.0 * ok,
                    "correct": bool(ok),
                }
                for (prompt, answer), ok in zip(examples[task], right, strict=True)
            ]
            write_predictions(folder / "predictions", row, task, names[task], lines)


if __name__ == "__main__":
    import sys

    make_run(Path(sys.argv[1]), sys.argv[2], tasks=int(sys.argv[3]))
