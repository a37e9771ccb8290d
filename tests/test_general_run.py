"""Runs whose tasks are mixed with general rows: shares, every method, resuming, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.config import parse_config
from jaxcl.errors import UserError
from jaxcl.methods import METHODS, find_method
from jaxcl.run.components import build
from jaxcl.run.folder import RunFolder
from jaxcl.run.remembering import load_kept
from jaxcl.run.streams import task_stream
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import PAIRS, TEXT, numbers, run

GENERAL: dict[str, Any] = {"source": "stdlib:python_topics", "train": 40, "share": 0.4, "by": "rows"}
SHORT: dict[str, Any] = {
    **PAIRS,
    "data": {**PAIRS["data"], "length": 48, "general": GENERAL},
    "training": {"batch_size": 8, "steps": 5, "log_every": 1},
    "evaluation": {"batch_size": 4, "limit": 2, "max_new_tokens": 24},
}
REPLAY = {"fraction": 0.25, "every": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "replay": {"replay": REPLAY},
    "derpp": {"replay": {"fraction": 0.25, "mode": "mix"}},
    "das": {"importance_examples": 8},
    "das_paper": {"importance_examples": 8},
    "ewc": {"fisher_examples": 8},
    "seekr": {"layer_budget": 1, "head_budget": 1, "query_budget": 8, "replay": REPLAY},
    "progressive_prompts": {"length": 3},
}
MODELS: dict[str, dict[str, Any]] = {
    "olora": {"lora": {"rank": 2, "targets": ["query", "down"]}},
    "progressive_prompts": {"soft_tokens": 8},
    "sdft": {"max_length": 176},
}
UNPACKED = {"sdft"}


MIX = [
    {"source": "stdlib:unicode_bidi", "train": 40, "test": 4, "weight": 0.75},
    {"source": "stdlib:unicode_category", "train": 8, "test": 2, "weight": 0.25, "name": "category"},
]
MIXED: dict[str, Any] = {
    **SHORT,
    "data": {**PAIRS["data"], "general": None},
    "tasks": [
        {"name": "both", "mix": MIX, "mix_by": "rows"},
        {"name": "numbers", "source": "stdlib:unicode_numeric", "train": 16, "test": 4},
    ],
    "training": {"batch_size": 8, "epochs": 1, "log_every": 1, "checkpoint_every": 3},
}


IN_A_PROCESS = """
import json, sys
from jaxcl.config import parse_config
from jaxcl.run import sequence
sequence.run(parse_config(json.load(sys.stdin)))
"""


def with_general(content: dict[str, Any], **general: Any) -> dict[str, Any]:
    return {**content, "data": {**content["data"], "general": {**GENERAL, **general}}}


def kinds(folder: Path, task: int) -> list[str]:
    return [row["kind"] for row in numbers(folder) if row["task"] == task]


FAST = ("seekr",)


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(METHODS) if name not in FAST)]
)
def test_every_method_learns_mixtures_packed_pairs_and_general_rows(name: str, tmp_path: Path) -> None:
    content = {
        **SHORT,
        "model": {**SHORT["model"], **MODELS.get(name, {})},
        "data": {**SHORT["data"], "pack_pairs": name not in UNPACKED, "bucket_lengths": [96]},
        "tasks": MIXED["tasks"],
        "training": {"batch_size": 4, "steps": 5, "log_every": 1},
    }
    if name == "progressive_prompts":  # learns vectors before prompts
        content = with_general(content, source="stdlib:unicode_numeric")
    results = run(content, tmp_path, {"name": name, **OPTIONS.get(name, {})})
    assert results.finished
    assert results.tasks == ["both", "numbers"]
    assert all(np.isfinite(row["loss"]) for row in numbers(tmp_path))
    joint = find_method(name).joint
    for task in (0,) if joint else (0, 1):
        order = kinds(tmp_path, task)
        assert len(order) == (10 if joint else 5)
        assert [place for place, kind in enumerate(order) if kind == "general"] == ([1, 3, 6, 8] if joint else [1, 3])
    remembers = "replay" in find_method(name).Options.model_fields and not joint
    if name == "derpp":  # remembered rows are in the task's batches
        second = [row for row in numbers(tmp_path) if row["task"] == 1]
        assert [("term/memory_match" in row, row["kind"]) for row in second].count((True, "task")) == 3
        assert ["term/memory_match" in row for row in second].count(True) == 3
    else:
        assert ("memory" in kinds(tmp_path, 1 - joint)) == remembers
    if remembers:
        memory = json.loads((tmp_path / "memory.json").read_text())
        assert [task["count"] for task in memory["tasks"]] == [48, 16], "rows of the tasks alone, one pair each"
    described = results.data["all tasks" if joint else "both"]
    assert described["general"]["sources"]["data.general"]["examples"] > 0
    assert described["general"]["step_share"] == 0.4
    source = described.get("task", described)["sources"]["both"]
    assert source["examples"] == 48
    assert name in UNPACKED or source["packed_rows"] < 48


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(RESUMED, folder, {"name": "replay", "replay": REPLAY})
    return folder


RESUMED = {**SHORT, "training": {"batch_size": 8, "epochs": 1, "log_every": 1, "checkpoint_every": 3}}


@pytest.mark.slow
def test_an_epoch_holds_all_batches_of_the_task_and_general_ones_besides(whole: Path) -> None:
    first, second = kinds(whole, 0), kinds(whole, 1)
    assert first.count("task") == 4  # 32 rows
    assert len(first) == 6
    assert second.count("task") == 3
    assert second.count("general") == round(0.4 * len(second))
    assert second.count("memory") == 1


@pytest.mark.slow
@pytest.mark.parametrize("saves", [2, 4])
def test_a_resumed_run_sees_the_same_batches(whole: Path, tmp_path: Path, saves: int) -> None:
    method = {"name": "replay", "replay": REPLAY}
    with killed_at_save(saves):
        run(RESUMED, tmp_path, method)
    run(RESUMED, tmp_path, method)
    assert numbers(tmp_path) == numbers(whole)


@pytest.mark.slow
def test_accumulation_and_several_devices_change_no_number(tmp_path: Path) -> None:
    content = {**SHORT, "tasks": SHORT["tasks"][:1]}
    spread = {**content, "training": {**SHORT["training"], "accumulate": 2}, "mesh": {"data": 2, "fsdp": 2}}
    run(content, tmp_path / "one", "sequential")
    there = {**spread, "output": str(tmp_path / "four"), "method": "sequential"}
    # Only another process can have more devices.
    subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS],
        input=json.dumps(there),
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "4"},
        text=True,
        check=True,
    )
    one, four = (numbers(tmp_path / name) for name in ("one", "four"))
    assert [row["kind"] for row in one] == [row["kind"] for row in four]
    np.testing.assert_allclose([row["loss"] for row in one], [row["loss"] for row in four], rtol=1e-4)


@pytest.mark.slow
def test_by_tokens_the_share_is_that_of_tokens(tmp_path: Path) -> None:
    content = with_general(SHORT, by="tokens", share=0.5)
    parts = build(parse_config({**content, "output": str(tmp_path), "method": "sequential"}), RunFolder(tmp_path))
    kept = load_kept(RunFolder(tmp_path), 0, None)
    stream: Any = task_stream(parts, RunFolder(tmp_path), kept, 0, stored=False)
    tokens = {"task": 0, "general": 0}
    steps = {"task": 0, "general": 0}
    while steps["task"] % stream.own.steps_per_epoch or steps["task"] < 40 * stream.own.steps_per_epoch:
        batch = stream.batch_at(sum(steps.values()), seed=0)
        tokens[batch["origin"]] += int((batch["segments"] > 0).sum())
        steps[batch["origin"]] += 1
    assert steps["general"] > 50
    assert tokens["general"] / sum(tokens.values()) == pytest.approx(0.5, abs=0.01)
    assert steps["general"] != pytest.approx(steps["task"], rel=0.02)


def test_general_rows_that_changed_stop_the_resume(tmp_path: Path) -> None:
    texts = tmp_path / "general.txt"
    texts.write_text("".join(f"sentence number {n} of the general text\n" for n in range(60)))
    content = with_general(SHORT, source=f"text:{texts}")
    with killed_at_save(2):
        run(content, tmp_path / "run", "sequential")
    texts.write_text(texts.read_text().replace("general", "other"))
    with pytest.raises(UserError, match=r"^data\.general: the train rows in .*general\.txt have changed"):
        run(content, tmp_path / "run", "sequential")


@pytest.mark.parametrize(
    ("content", "method", "message"),
    [
        (
            with_general({**SHORT, "model": {**SHORT["model"], "soft_tokens": 8}}),
            OPTIONS["progressive_prompts"] | {"name": "progressive_prompts"},
            "method.name: progressive_prompts needs prompts and answers; data.general is text",
        ),
        (
            with_general(TEXT, source="stdlib:unicode_numeric"),
            "sequential",
            "^data.general: prompts and answers need a dec",
        ),
        (with_general(SHORT, source="stdlib:python_topic_names"), "sequential", "^data.general: labelled examples"),
        (with_general(SHORT, source="jsonl:nowhere"), "sequential", "^data.general: .*nowhere"),
        (with_general(SHORT, source="txt:nowhere"), "sequential", "^data.general: source 'txt:nowhere'"),
        (
            {**SHORT, "data": {**SHORT["data"], "length": 97}},
            "sequential",
            r"data.length: 97 tokens .*\(data.general\)",
        ),
    ],
)
def test_general_rows_that_do_not_fit_are_refused_before_training(
    content: dict[str, Any], method: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(content, tmp_path, method)


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_a_share_is_between_0_and_1(share: float) -> None:
    with pytest.raises(UserError, match=r"data\.general\.share"):
        parse_config({**with_general(SHORT, share=share), "output": "x", "method": "sequential"})


@pytest.mark.slow
def test_steps_on_general_rows_tell_nothing_about_the_task(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    privacy = {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3}
    content = {**SHORT, "tasks": SHORT["tasks"][:1]}
    content["training"] = {"batch_size": 8, "epochs": 1, "privacy": privacy}
    found = [
        run(one, tmp_path / name, "sequential").extra["privacy"]
        for name, one in (("with", content), ("without", {**content, "data": PAIRS["data"]}))
    ]
    assert found[0] == found[1]


# ---------------------------------------------------------------- mixtures and packed pairs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["seekr", "joint"])
def test_a_mixture_is_learned_remembered_and_resumed(name: str, tmp_path: Path) -> None:
    method = {"name": name, **OPTIONS.get(name, {})}
    results = run(MIXED, tmp_path / "whole", method)
    assert results.tasks == ["both", "numbers"]
    joint = name == "joint"
    source = results.data["all tasks" if joint else "both"]
    source = (source if joint else source.get("task", source))["sources"]["both"]
    assert source["examples"] == 48
    assert source["mix"]["both: category"]["row_share"] == 0.25
    # 40 rows are three quarters of an epoch.
    assert sum(results.steps.values()) >= 7
    assert results.steps["all tasks" if joint else "both"] == (9 if joint else 7)
    with killed_at_save(3):
        run(MIXED, tmp_path / "killed", method)
    run(MIXED, tmp_path / "killed", method)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    predicted = sorted((tmp_path / "whole" / "predictions").glob("*task00.jsonl"))[-1].read_text().splitlines()
    assert len(predicted) == 2  # the limit


@pytest.mark.parametrize("data", [{"tasks": MIXED["tasks"]}, {"data": {**PAIRS["data"], "pack_pairs": True}}])
def test_private_training_wants_each_example_in_a_row_of_its_own(data: dict[str, Any], tmp_path: Path) -> None:
    privacy = {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3}
    content = {**PAIRS, **data, "training": {"batch_size": 8, "steps": 2, "privacy": privacy}}
    with pytest.raises(UserError, match=r"^training\.privacy: (tasks\.0\.mix|data\.pack_pairs) puts examples"):
        run(content, tmp_path, "sequential")


def test_a_packed_batch_has_the_loss_of_its_pairs(tmp_path: Path) -> None:
    content = {**MIXED, "data": {**PAIRS["data"], "pack_pairs": True, "bucket_lengths": [88]}}
    parts = build(parse_config({**content, "output": str(tmp_path), "method": "sequential"}), RunFolder(tmp_path))
    params = jax.jit(parts.network.init)(jax.random.key(1))
    alone, packed = parts.train_rows(1), parts.learned_rows[1]
    batch = parts.training_pipeline(1).batch_at(0, seed=0)
    members = np.concatenate([packed.members[row] for row in batch["example"] if row >= 0])
    assert len(members) > (batch["example"] >= 0).sum()
    shape = alone.shapes([])[-1]
    rows = [alone.row(int(member), shape, (0,)) for member in members]
    single = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    ids = np.zeros(len(rows), np.int32)

    def total(fields: Any) -> tuple[float, float]:
        names = ("tokens", "segments", "positions", "predict", "targets", "weights", "task", "example")
        whole = sequence_batch({name: fields[name] for name in names})
        term = parts.method.loss(params, {}, whole, jax.random.key(0))["loss"]
        return float(term.sum), float(term.count)

    found, expected = total(batch), total({**single, "task": ids, "example": ids})
    assert found[1] == expected[1] == sum(len(alone.answer(int(member))) for member in members)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)


def sequence_batch(fields: dict[str, np.ndarray]) -> Any:
    from jaxcl.models.batch import Batch

    return Batch(**fields)  # type: ignore[arg-type]
