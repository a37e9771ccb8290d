"""Whole runs of tiny models: what they leave behind, that they resume exactly, that they refuse what is not theirs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jaxcl.commands.generate import generate_text
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.reporting.report import write_report
from jaxcl.run import sequence
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import PAIRS, SEEKR, TEXT, numbers, run


@pytest.fixture(scope="module")
def seekr_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "seekr"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sequence, "write_report", write_report)
        run(PAIRS, folder, SEEKR)
    return folder


def test_a_run_leaves_what_the_documentation_says(seekr_folder: Path) -> None:
    results = json.loads((seekr_folder / "results.json").read_text())
    assert results["method"] == "seekr"
    assert results["tasks"] == ["direction", "category"]
    assert results["finished"]
    assert [len(row) for row in results["matrix"]] == [2, 2]
    assert results["initial"] is not None
    for key in ("op", "bwt", "fwt", "forgetting", "seconds", "versions"):
        assert results[key] is not None, key
    for name in ("config.yaml", "metrics.jsonl", "report.html", "memory.json", "tokenizer/tokenizer.json"):
        assert (seekr_folder / name).stat().st_size > 0, name
    assert list((seekr_folder / "checkpoints").iterdir())
    assert list(seekr_folder.glob("**/events.out.tfevents*"))
    lines = (seekr_folder / "predictions/after01_task00.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert len(predictions) == 4
    assert {"prompt", "prediction", "answer", "score"} <= predictions[0].keys()


def test_replayed_steps_distil_the_selected_heads(seekr_folder: Path) -> None:
    memory = [row for row in numbers(seekr_folder) if row["kind"] == "memory"]
    assert memory, "an epoch of the second task must see the memory"
    assert all(np.isfinite(row["term/attention"]) and row["term/attention"] >= 0 for row in memory)
    assert all(row["task"] == 1 for row in memory)
    tables = np.load(seekr_folder / "importance" / "after01.npz")
    assert tables["selected_heads"].sum(axis=(1, 2)).tolist() == [1, 1]
    assert results_bytes(seekr_folder) > 0


def results_bytes(folder: Path) -> int:
    return int(json.loads((folder / "results.json").read_text())["stored_bytes"])


def test_a_finished_run_is_not_repeated(seekr_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "build", lambda *_: pytest.fail("trained again"))
    assert run(PAIRS, seekr_folder, SEEKR).finished


def test_a_folder_of_another_configuration_is_refused(seekr_folder: Path) -> None:
    before = (seekr_folder / "results.json").read_bytes()
    with pytest.raises(UserError, match=r"contains a run with seed=0, this one has 1"):
        run({**PAIRS, "seed": 1}, seekr_folder, SEEKR)
    assert (seekr_folder / "results.json").read_bytes() == before


def test_a_folder_from_before_a_key_existed_is_the_same_run_if_its_default_holds(
    seekr_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "build", lambda *_: pytest.fail("trained again"))
    path = seekr_folder / "config.yaml"
    text = path.read_text()
    content = yaml.safe_load(text)
    try:
        del content["evaluation"]["end_tasks"]  # PAIRS leaves it at its default
        path.write_text(yaml.safe_dump(content))
        assert run(PAIRS, seekr_folder, SEEKR).finished
        del content["evaluation"]["future"]
        path.write_text(yaml.safe_dump(content))
        with pytest.raises(UserError, match=r"evaluation.future='none', this one has 'next'"):
            run(PAIRS, seekr_folder, SEEKR)
    finally:
        path.write_text(text)


def test_a_trained_model_writes_text(seekr_folder: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "seed": 0, "raw": False}
    first = generate_text(str(seekr_folder), "DIGIT ONE\nCategory:", **options)
    assert first == generate_text(str(seekr_folder), "DIGIT ONE\nCategory:", **options)
    with pytest.raises(UserError, match="leaves room for"):
        generate_text(str(seekr_folder), "DIGIT " * 300, **{**options, "raw": True})


@pytest.mark.parametrize("saves", [2, *(pytest.param(saves, marks=pytest.mark.slow) for saves in (3, 4))])
def test_an_interrupted_run_goes_on_exactly_where_it_stopped(seekr_folder: Path, tmp_path: Path, saves: int) -> None:
    """Killed right after its 2nd, 3rd and 4th checkpoint: within the first task, at its end, within the second."""
    folder = tmp_path / "run"
    with killed_at_save(saves):
        run(PAIRS, folder, SEEKR)
    results = run(PAIRS, folder, SEEKR)
    whole = Results.read(seekr_folder / "results.json")
    assert (results.matrix, results.initial) == (whole.matrix, whole.initial)
    assert numbers(folder) == numbers(seekr_folder)


def test_joint_training_learns_all_tasks_at_once(tmp_path: Path) -> None:
    results = run(PAIRS, tmp_path / "run", "joint")
    assert results.joint
    assert len(results.matrix) == 1
    assert None not in results.matrix[0]
    assert results.bwt is None


@pytest.mark.slow
def test_das_over_text_domains_with_an_end_task(tmp_path: Path) -> None:
    results = run(TEXT, tmp_path / "run", {"name": "das", "importance_examples": 16})
    assert results.metric == ["perplexity"] * 2
    assert results.higher_is_better == [False, False]
    assert results.further["token_accuracy"].matrix[1][1] is not None
    assert 0 <= results.further["end task macro_f1"].matrix[1][0] <= 100  # type: ignore[operator]
    tables = np.load(tmp_path / "run" / "importance" / "after01.npz")
    assert tables["importance_heads"].shape == (2, 2)
    assert tables["importance_intermediate"].max() > 0


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (PAIRS, {"tasks": [{"name": "x", "source": "json:nowhere"}]}, "nowhere"),
        (PAIRS, {"tasks": [{"name": "x", "source": "stdlib:unicode_bid"}]}, "unicode_bidi"),
        (PAIRS, {"data": {"prompt_length": 90, "answer_length": 24}}, "max_length=96"),
        (PAIRS, {"training": {"batch_size": 9, "accumulate": 2}}, "training.batch_size: 9 must be a multiple of 2"),
        (PAIRS, {"model": {**PAIRS["model"], "vocab_size": 280}}, "280"),
        (TEXT, {"tasks": PAIRS["tasks"]}, "need a decoder"),
        (PAIRS, {"weights": "nowhere"}, "nowhere"),
        (
            PAIRS,
            {"evaluation": {"pairs_metric": "choice_accuracy"}},
            "task direction: test row 1: by the metric choice_accuracy the right answer",
        ),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    tmp_path: Path, content: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        run({**content, **changes}, tmp_path / "run", "sequential")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
