"""Whole runs of the architectures beyond the first two: they resume to the bit, and are planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.config import parse_config
from jaxcl.evaluation.results import Results
from jaxcl.planning.plan import plan
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import DECODER, ENCODER, PAIRS, SEEKR, TEXT, numbers, run, stored

DAS = {"name": "das", "importance_examples": 8}
MIXTURE: dict[str, Any] = {
    **DECODER,
    "family": "qwen3_moe",
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_size": 12,
    "normalise_top_k": True,
    "qk_norm": "head",
    "router_loss_weight": 0.01,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixture": MIXTURE,
    "modernbert": {**ENCODER, "architecture": "modernbert", "layer_types": ["full", "window"], "window": 5},
    "deberta": {**ENCODER, "architecture": "deberta", "position_buckets": 8, "max_distance": 48},
}
DOMAINS = {
    **TEXT,
    "tasks": [{**task, "end_task": None} for task in TEXT["tasks"]],
    "training": {**TEXT["training"], "checkpoint_every": 2},
    "evaluation": {"batch_size": 8},
}
CASES = {
    "mixture, seekr": (PAIRS, "mixture", SEEKR),
    "mixture, das": (PAIRS, "mixture", DAS),
    "modernbert, das": (DOMAINS, "modernbert", DAS),
    "deberta, das": (DOMAINS, "deberta", DAS),
    "deberta, seekr": (DOMAINS, "deberta", SEEKR),
}
SLOW = {"modernbert, das", "mixture, das", "deberta, das", "deberta, seekr"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_a_run_that_was_killed_ends_with_the_same_bits(case: str, tmp_path: Path) -> None:
    content, model, method = CASES[case]
    content = {**content, "model": MODELS[model]}
    whole = run(content, tmp_path / "whole", method)
    assert whole.finished
    with killed_at_save(3):
        run(content, tmp_path / "killed", method)
    run(content, tmp_path / "killed", method)
    resumed = Results.read(tmp_path / "killed" / "results.json")
    assert (resumed.matrix, resumed.further) == (whole.matrix, whole.further)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, stored(tmp_path / "killed"), stored(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_its_steps_are_planned(case: str, tmp_path: Path) -> None:
    content, model, method = CASES[case]
    config = parse_config({**content, "model": MODELS[model], "method": method, "output": str(tmp_path / "run")})
    found = plan(config, "v5e:1x1", ["train"])
    assert found.fits
    assert (found.steps["train"].flops or 0) > 0
