"""`jaxcl teacher`: what a run's store takes and loses, from its folder alone."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import store_loss
from jaxcl.commands.teacher import describe_teacher
from jaxcl.config import load_config, parse_config
from jaxcl.data.memory import Memory
from jaxcl.data.teacher_store import TeacherStore
from jaxcl.errors import UserError
from jaxcl.run import sequence
from jaxcl.run.components import build
from jaxcl.run.folder import RunFolder
from tests.tiny.runs import DECODER, PAIRS, SEEKR

LAYERS, HEADS, VOCAB = (DECODER[key] for key in ("num_layers", "num_heads", "vocab_size"))
WEIGHTS = {"loss": 0.5, "logits": 0.5, "attention": 1000.0}
CONFIG: dict[str, Any] = {
    **PAIRS,
    "tasks": [{**task, "test": 2} for task in PAIRS["tasks"]],
    "training": {"batch_size": 8, "steps": 6, "log_every": 2, "keep_tasks": None},
    "optimizer": {"learning_rate": 3e-2},
    "evaluation": {"batch_size": 2, "max_new_tokens": 24},
    "method": {**SEEKR, "layer_budget": 2, "head_budget": 2, "distil_heads": "rows", "logit_weight": 0.5},
}


def run(folder: Path, **changes: Any) -> Path:
    content = {**CONFIG, "output": str(folder), "method": {**CONFIG["method"], **changes}}
    sequence.run(parse_config(content))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "compact", store_logits=4)


@pytest.fixture(scope="module")
def report(folder: Path) -> str:
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    text = describe_teacher(folder)
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == before
    return text


def block(report: str, task: str) -> str:
    (found,) = (part for part in report.split("\n\n") if part.startswith(f"{task}: "))
    return found


def numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, text
    return [float(number.replace(",", "")) for number in found.groups()]


def changes(text: str) -> dict[str, tuple[float, float, float]]:
    """Exact value, stored value and relative change of each term."""
    found = re.findall(r"(\w+) +exact (\S+), as stored (\S+): (\S+)%", text)
    return {name: (float(exact), float(stored), float(change) / 100) for name, exact, stored, change in found}


@pytest.mark.parametrize(("index", "task", "samples"), [(0, "direction", 8), (1, "category", 6)])
def test_bytes_are_those_on_disk(folder: Path, report: str, index: int, task: str, samples: int) -> None:
    paths = RunFolder(folder).stores(index)
    store, text = TeacherStore.open(paths), block(report, task)
    assert text.startswith(f"{task}: {samples} samples\n")
    assert len(store) == samples
    means = {name: np.mean([store[i][name].nbytes for i in range(samples)]) for name in store.fields}
    for name, mean in means.items():
        assert numbers(rf"{name} ([\d,]+)", text)[0] == pytest.approx(mean, abs=0.51)
    disk = sum(path.stat().st_size for path in paths) / samples
    assert numbers(r"bytes per sample: ([\d,]+) \(", text)[0] == pytest.approx(sum(means.values()), abs=0.51)
    assert numbers(r"([\d,]+) in the compressed file", text)[0] == pytest.approx(disk, abs=0.51)
    # Maps of all heads and logits of all answer tokens, of rows without padding.
    rows = build(load_config(folder / "config.yaml"), RunFolder(folder)).train_rows(index)
    kept = Memory.load(RunFolder(folder).memory).tasks[index].kept
    batches = [rows.sizes[example] for example in kept]
    full = np.mean([4 * (LAYERS * HEADS * tokens**2 + VOCAB * scored) for tokens, scored in batches])
    assert numbers(r"logits: ([\d,]+) bytes", text)[0] == pytest.approx(full, abs=0.51)
    assert numbers(r"([\d.,]+) times as many", text)[0] == pytest.approx(full / sum(means.values()), abs=0.051)


def test_loss_of_information_is_that_of_each_form(report: str) -> None:
    first, last = (block(report, name) for name in ("direction", "category"))
    assert "the run's latest model compared with" in first
    assert "the run's initial model compared with" in last
    for text in (first, last):
        found = changes(text)
        assert found.keys() == {"attention", "loss", "logits"}
        assert found["attention"][0] > 1e-5
        assert 0 < abs(found["attention"][2]) < 0.1
        assert found["loss"][2] == 0
        # Four of 300 tokens and the rest as one: never more than the whole divergence, and here far less.
        assert -1 < found["logits"][2] < -0.01
        for exact, stored, change in found.values():
            assert change == pytest.approx(stored / exact - 1, abs=2e-5)


@pytest.mark.slow
def test_stores_of_other_sizes_are_compared_without_another_run(folder: Path, report: str) -> None:
    options = argparse.Namespace(stored="4", drawn="0,0.5", draws=5)
    found = store_loss.changes(RunFolder(folder), options)
    for task in ("direction", "category"):
        exact, _, change = changes(block(report, task))["logits"]
        assert found[task]["exact"] == pytest.approx(exact, rel=1e-4)
        # The run's own store holds four tokens; an eighth of four draws none.
        assert found[task]["4, 0 drawn"] == {"mean": pytest.approx(100 * change, abs=0.02), "deviation": 0}
        assert found[task]["4, 0.5 drawn"]["deviation"] > 0
        assert abs(found[task]["4, 0.5 drawn"]["mean"]) < 0.5 * abs(found[task]["4, 0 drawn"]["mean"])


@pytest.mark.slow
def test_an_exact_store_loses_nothing_and_mixed_memory_is_learned_in_every_step(tmp_path: Path) -> None:
    mixed = {"fraction": 0.25, "mode": "mix"}
    folder = run(tmp_path / "exact", store_logits=0, store_attention="float32", replay=mixed)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"task"}
    assert [row["task"] for row in rows] == [0] * 3 + [1] * 3
    for row in rows:
        remembered = {name for name in row if name.startswith("term/memory_")}
        assert remembered == (
            {f"term/memory_{name}" for name in ("loss", "logits", "attention")} if row["task"] else set()
        )
        assert row["loss"] == pytest.approx(
            row["term/loss"] + sum(weight * row.get(f"term/memory_{name}", 0.0) for name, weight in WEIGHTS.items()),
            rel=1e-5,
        )
    text = describe_teacher(folder)
    for task in ("direction", "category"):
        for exact, stored, change in changes(block(text, task)).values():
            assert exact > 1e-6
            assert abs(change) < 1e-5
            assert stored == pytest.approx(exact, rel=1e-5)


def test_what_cannot_be_told_is_said(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        describe_teacher(tmp_path)
    (store,) = RunFolder(folder).stores(0)
    content = store.read_bytes()
    try:
        store.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=r"task00_process000\.array_record is (truncated|not a teacher store)"):
            describe_teacher(folder)
    finally:
        store.write_bytes(content)
