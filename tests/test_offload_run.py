"""Runs with `optimizer.offload`: what only the optimizer reads waits on the host, and no bit changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.same_runs import last_arrays
from jaxcl.config import parse_config
from jaxcl.run.components import build, initial_params
from jaxcl.run.folder import RunFolder
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import PAIRS, numbers, run

DAS: dict[str, Any] = {"name": "das", "strength": 4.0, "importance_examples": 8}


def config(offload: bool) -> dict[str, Any]:
    return {**PAIRS, "optimizer": {**PAIRS.get("optimizer", {}), "offload": offload}}


def test_an_anchor_on_the_host_changes_no_bit_also_after_a_stop(tmp_path: Path) -> None:
    plain = run(config(False), tmp_path / "devices", DAS)
    with killed_at_save(4):  # within the second task, when the anchor has moved
        run(config(True), tmp_path / "host", DAS)
    assert run(config(True), tmp_path / "host", DAS).matrix == plain.matrix
    assert numbers(tmp_path / "devices") == numbers(tmp_path / "host")
    arrays, others = (last_arrays(tmp_path / name / "checkpoints") for name in ("devices", "host"))
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


def test_where_the_state_of_das_waits(tmp_path: Path) -> None:
    content = {**config(True), "output": str(tmp_path / "run"), "method": DAS}
    parts = build(parse_config(content), RunFolder(tmp_path / "run"))
    own = parts.trainer.init(initial_params(parts)).method_state

    def kinds(tree: Any) -> set[str]:
        return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}

    assert kinds(own["anchor"]) == {"pinned_host"}
    assert kinds({name: own[name] for name in own if name != "anchor"}) == {"device"}
