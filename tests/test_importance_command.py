"""`jaxcl importance`: what a run would have measured, without the run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jaxcl.commands.importance import measure_importance
from jaxcl.config import parse_config
from jaxcl.errors import UserError
from jaxcl.models.batch import Batch
from jaxcl.run import sequence
from jaxcl.training.task import RunningTask
from tests.tiny import runs

COMMON: dict[str, Any] = {
    "optimizer": {"learning_rate": 1e-30},  # too little to move any weight
    "training": {"batch_size": 8, "steps": 1},
}
PAIRS: dict[str, Any] = {
    **runs.PAIRS,
    **COMMON,
    "evaluation": {"batch_size": 4, "max_new_tokens": 24},
    "method": {"name": "seekr", "layer_budget": 2, "head_budget": 2, "replay": {"fraction": 0.25}},
}
TEXT: dict[str, Any] = {
    **runs.TEXT,
    **COMMON,
    "tasks": [{**task, "train": 24, "end_task": None} for task in runs.TEXT["tasks"]],
    "evaluation": {"batch_size": 8},
    "method": {"name": "das", "importance_examples": 16},
}


def written(content: dict[str, Any], folder: Path, **changes: Any) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**content, "output": str(folder / "run"), **changes}), encoding="utf-8")
    return str(path)


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def run(content: dict[str, Any], folder: Path, **changes: Any) -> Path:
    output = folder / "run"
    sequence.run(parse_config({**content, "output": str(output), **changes}))
    return output


@pytest.mark.slow
def test_das_measures_what_a_run_that_moves_nothing_measures(tmp_path: Path) -> None:
    page = measure_importance(written(TEXT, tmp_path), [], None)
    assert page == tmp_path / "run_importance" / "importance.html"
    expected = arrays(run(TEXT, tmp_path) / "importance" / "after01.npz")
    measured = arrays(page.parent / "importance.npz")
    assert measured.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(measured[name], array, err_msg=name)
    assert measured["domains_heads"].any(axis=(1, 2)).all()
    shown = page.read_text(encoding="utf-8")
    for heading in ("Soft masks and the capacity left", "Units needed by each domain", "Overlap between domains"):
        assert heading in shown
    pictures = {path.name for path in page.parent.glob("*.png")}
    assert {"importance_heads.png", "importance_intermediate.png", "overlap.png", "sorted_units.png"} <= pictures
    assert not (tmp_path / "run_importance" / "config.yaml").exists()


@pytest.mark.parametrize(
    "content", [pytest.param(TEXT, marks=pytest.mark.slow, id="das"), pytest.param(PAIRS, id="seekr")]
)
def test_micro_batches_measure_the_same(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    place = RunningTask._place

    def watched(task: RunningTask, rows: Any) -> Batch:
        batch = place(task, rows)
        seen.add(batch.size)
        return batch

    monkeypatch.setattr(RunningTask, "_place", watched)
    tables = []
    for accumulate, rows in ((1, 8), (4, 2)):
        training = {**content["training"], "accumulate": accumulate}
        out = tmp_path / str(accumulate)
        measure_importance(written(content, tmp_path, training=training), [], out)
        assert seen == {rows}
        seen.clear()
        tables.append(arrays(out / "importance.npz"))
    for name, array in tables[0].items():
        np.testing.assert_allclose(tables[1][name], array, rtol=1e-3, atol=2e-4, err_msg=name)
    assert any(array.any() for array in tables[0].values())


def test_heads_of_an_untrained_model_are_rated_by_sensitivity_and_the_page_says_so(tmp_path: Path) -> None:
    page = measure_importance(written(PAIRS, tmp_path), ["method.head_budget=3"], tmp_path / "out")
    tables = arrays(tmp_path / "out" / "importance.npz")
    sensitivity = tables["sensitivity"]
    np.testing.assert_allclose(sensitivity.sum(axis=-1), 1, rtol=1e-6)  # every task, every layer
    assert not tables["forgettability"].any()
    np.testing.assert_allclose(tables["importance_heads"], sensitivity.sum(axis=0), rtol=1e-6)
    best = np.sort(sensitivity[0].ravel())[-3]
    np.testing.assert_array_equal(tables["selected_heads"][0], sensitivity[0] >= best)
    shown = page.read_text(encoding="utf-8")
    assert "rated by sensitivity alone" in shown
    assert "Forgettability</h3>" not in shown
    assert "Sensitivity</h3>" in shown


def test_a_run_folder_shows_what_its_training_moved(tmp_path: Path) -> None:
    """Of a run of one task, begin and end are those of the task: what the run measured itself."""
    folder = run({**PAIRS, "optimizer": {"learning_rate": 1e-2}, "tasks": PAIRS["tasks"][:1]}, tmp_path)
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    page = measure_importance(str(folder), [], tmp_path / "out")
    measured, expected = arrays(tmp_path / "out" / "importance.npz"), arrays(folder / "importance" / "after00.npz")
    assert measured["forgettability"].any()
    assert measured.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(measured[name], array, err_msg=name)
    assert "alone" not in page.read_text(encoding="utf-8")
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == before


def test_a_method_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sequential measures no importance; allowed: das, das_paper, seekr") as caught:
        measure_importance(written(TEXT, tmp_path, method="sequential"), [], None)
    assert caught.value.exit_code == 2
    with pytest.raises(UserError, match="not a run folder"):
        measure_importance(str(tmp_path / ".."), [], None)
