"""Runs of models that see: killed and resumed they end with the same bits, on two processes with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from jaxcl.config import parse_config
from jaxcl.evaluation.results import Results
from jaxcl.run import sequence
from jaxcl.run.model import load_model
from tests.test_identity_processes import start
from tests.test_vision_run import content
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import numbers, stored

pytestmark = pytest.mark.slow

METHODS: dict[str, dict[str, Any]] = {
    "das": {"name": "das", "importance_examples": 8, "hold": "both"},
    "das_paper": {"name": "das_paper", "importance_examples": 8},
    "seekr": {
        "name": "seekr",
        "layer_budget": 2,
        "head_budget": 3,
        "query_budget": 4,
        "distil_heads": "rows",
        "modality_budgets": [1, 1, 0, 1],
        "modality_weights": [1.0, 2.0, 0.5],
        "replay": {"fraction": 0.5, "mode": "interleave"},
    },
}


def config(folder: Path, output: Path, method: str) -> dict[str, Any]:
    return {**content(folder, "sequential"), "method": METHODS[method], "output": str(output)}


def run(folder: Path, output: Path, method: str) -> Results:
    return sequence.run(parse_config(config(folder, output, method))).results


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_killed_ends_with_the_same_bits(method: str, tmp_path: Path) -> None:
    whole = run(tmp_path, tmp_path / "whole", method)
    assert whole.finished
    with killed_at_save(4):
        run(tmp_path, tmp_path / "killed", method)
    resumed = run(tmp_path, tmp_path / "killed", method)
    assert resumed.matrix == whole.matrix
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, stored(tmp_path / "killed"), stored(tmp_path / "whole"))
    params = stored(tmp_path / "whole")[0]
    assert np.any(params["vision"]["tower"]["blocks"]["query"]["kernel"])


def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    alone = run(tmp_path, tmp_path / "alone", "seekr")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(tmp_path, tmp_path / "two", "seekr")))
    for code, error in start(tmp_path, [tmp_path, tmp_path]):
        assert code == 0, error
    both = Results.read(tmp_path / "two" / "results.json")
    assert both.steps == alone.steps
    losses = [[row["loss"] for row in numbers(tmp_path / name) if "loss" in row] for name in ("alone", "two")]
    assert len(losses[0]) > 4
    np.testing.assert_allclose(*losses, rtol=1e-4)
    one, two = (load_model(str(tmp_path / name)).params for name in ("alone", "two"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one, two)
