"""Runs whose schedule decays at the end of every task: the next task goes on from before the decay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.run.model import load_model
from jaxcl.training.checkpoint import Checkpoints
from jaxcl.training.kept import mark_after, mark_before_decay
from jaxcl.training.trainer import Trainer
from tests.tiny.devices import flags
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import DECODER, PAIRS, TOKENIZER, numbers, run, stored

WSD = {"learning_rate": 1e-2, "schedule": "wsd", "warmup": 1, "decay": 3, "final": 0.1}
INFINITE = {**WSD, "schedule": "infinite", "cooldown": 1, "warm_moments": 1}
TEXT: dict[str, Any] = {
    "model": DECODER,
    "tokenizer": TOKENIZER,
    "data": {"length": 48, "packing": False},
    "tasks": [
        {"name": "topics", "source": "stdlib:python_topics", "train": 24, "test": 4},
        {"name": "pydantic", "source": "stdlib:docstrings:pydantic", "train": 24, "test": 4},
    ],
    # Seven steps: the decay begins after the fourth, and checkpoints are written on both sides of it.
    "training": {"batch_size": 8, "steps": 7, "log_every": 1, "checkpoint_every": 3, "keep_tasks": None},
    "optimizer": WSD,
    "evaluation": {"batch_size": 4},
}


@contextmanager
def starts() -> Iterator[list[Any]]:
    """What each task of the runs in the block starts from, on the host."""
    original, found = Trainer.start_task, []

    def start_task(self: Trainer, state: Any, total: int, **options: Any) -> Any:
        found.append(jax.tree.map(np.array, state))
        return original(self, state, total, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "start_task", start_task)
        yield found


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    assert pairs
    return all(np.array_equal(left, right) for left, right in pairs)


def end(folder: Path) -> Any:
    """All that a run leaves that does not depend on the clock."""
    results = Results.read(folder / "results.json")
    params, state = stored(folder, mark_after(len(results.tasks) - 1))
    return leaves(params), leaves(state), numbers(folder), results.matrix, results.extra


def check_equal(folder: Path, whole: Path) -> None:
    (params, state, *rest), (other_params, other_state, *other_rest) = end(folder), end(whole)
    assert same(params, other_params)
    assert same(state, other_state)
    assert rest == other_rest


@pytest.fixture(scope="module")
def wsd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A run of `ewc` and what its tasks started from."""
    folder = tmp_path_factory.mktemp("runs") / "wsd"
    with starts() as found:
        run(TEXT, folder, "ewc")
    return folder, found


def test_the_next_task_starts_before_the_decay(wsd: tuple[Path, list[Any]]) -> None:
    folder, (_, second) = wsd
    params, state = stored(folder, mark_before_decay(0))
    assert int(state["clock"]["step"]) == 4
    assert same(second.params, params)
    assert same(second.opt_state, state["opt_state"])
    assert int(second.step) == 7, "steps of a run are counted on, so that no key is used twice"
    decayed, after = stored(folder, mark_after(0))
    assert not same(second.params, decayed)
    assert not same(second.opt_state, after["opt_state"])


def test_methods_see_the_decayed_model(wsd: tuple[Path, list[Any]]) -> None:
    folder, (_, second) = wsd
    decayed, _ = stored(folder, mark_after(0))
    assert same(second.method_state["anchor"], decayed)


@pytest.mark.slow
def test_the_model_before_a_task_is_the_decayed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher of `lwf`, and what `Task.params_before` reads."""
    from jaxcl.methods.lwf import Lwf

    before = []

    def consolidate(self: Any, params: Any, state: Any, task: Any) -> Any:
        before.append(jax.tree.map(np.array, task.params_before()))
        return state

    monkeypatch.setattr(Lwf, "consolidate", consolidate)
    with starts() as found:
        run(TEXT, tmp_path / "run", "lwf")
    decayed, _ = stored(tmp_path / "run", mark_after(0))
    assert same(found[1].method_state["teacher"], decayed)
    assert same(before[1], decayed)


def test_the_decayed_model_is_what_a_run_leaves(wsd: tuple[Path, list[Any]]) -> None:
    folder, _ = wsd
    params, _ = stored(folder, mark_after(1))
    assert same(load_model(str(folder)).params, params)
    assert not same(params, stored(folder, mark_before_decay(1))[0])


def test_learning_rates_of_a_run(wsd: tuple[Path, list[Any]]) -> None:
    rates = [row["learning_rate"] for row in numbers(wsd[0])]
    assert rates == pytest.approx([0, 1e-2, 1e-2, 1e-2, 1e-2, 7e-3, 4e-3] * 2)


# Checkpoints of a task: after steps 3, 4 (before the decay) and 6, and at its end; the first is that of the start.
@pytest.mark.slow
@pytest.mark.parametrize("save", [2, 3, 4, 5, 7])
def test_an_interrupted_run_goes_on_exactly(wsd: tuple[Path, list[Any]], tmp_path: Path, save: int) -> None:
    """Killed between stable and decay, right at the checkpoint, within the decay, at the task's end, and after it."""
    with killed_at_save(save):
        run(TEXT, tmp_path / "run", "ewc")
    run(TEXT, tmp_path / "run", "ewc")
    check_equal(tmp_path / "run", wsd[0])


@pytest.mark.slow
def test_a_run_killed_before_the_checkpoint_writes_it_when_it_goes_on(
    wsd: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    with killed_at_save(3, before=True):
        run(TEXT, tmp_path / "run", "ewc")
    run(TEXT, tmp_path / "run", "ewc")
    check_equal(tmp_path / "run", wsd[0])


@pytest.mark.slow
def test_a_missing_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = Checkpoints.find
    monkeypatch.setattr(Checkpoints, "find", lambda self, mark: None if "decay" in mark else find(self, mark))
    with pytest.raises(UserError, match="the one before the decay of task 0 is missing"):
        run(TEXT, tmp_path / "run", "sequential")


@pytest.mark.slow
def test_params_in_halves_of_16_bits_go_on_exactly(tmp_path: Path) -> None:
    content = {**TEXT, "model": {**DECODER, "compute": {"param_dtype": "bfloat16"}}, "optimizer": INFINITE}
    with killed_at_save(4):  # within the decay
        run(content, tmp_path / "run", "sequential")
    with starts() as found:
        run(content, tmp_path / "run", "sequential")
    run(content, tmp_path / "whole", "sequential")
    check_equal(tmp_path / "run", tmp_path / "whole")
    params, state = stored(tmp_path / "run", mark_before_decay(0))
    assert same(found[-1].params, params)
    assert same(found[-1].low_bits, state["low_bits"])
    rates = [row["learning_rate"] for row in numbers(tmp_path / "run")]
    annealing = [5e-3, 5e-3 * 0.2 ** (1 / 3), 5e-3 * 0.2 ** (2 / 3)]
    assert rates == pytest.approx([0, 0, 1e-2, 5e-3, *annealing, 0, 5e-3, 5e-3, 5e-3, *annealing])


@pytest.mark.slow
def test_adapters_that_join_the_weights_do_so_before_the_decay(tmp_path: Path) -> None:
    """O-LoRA: the decayed adapter is in the model of the task, the trunk's in that of the next ones."""
    content = {**TEXT, "model": {**DECODER, "lora": {"rank": 2, "targets": ["query"]}}}
    with starts() as found:
        run(content, tmp_path / "run", "olora")
    initial, second = (one.params["blocks"]["attention"]["query"] for one in found)
    before = stored(tmp_path / "run", mark_before_decay(0))[0]["blocks"]["attention"]["query"]
    after = stored(tmp_path / "run", mark_after(0))[0]["blocks"]["attention"]["query"]
    added = np.einsum("ldr,lrhk->ldhk", before["lora_a"], before["lora_b"])
    assert np.abs(added).max() > 0
    scale = (second["kernel"] - initial["kernel"]).flat[0] / added.flat[0]
    np.testing.assert_allclose(second["kernel"], initial["kernel"] + scale * added, rtol=1e-4, atol=1e-6)
    assert not same(second["kernel"], after["kernel"])
    assert not np.any(second["lora_b"])
    assert same(second["lora_a"], after["lora_a"])


@pytest.mark.slow
def test_separate_models_start_anew(tmp_path: Path) -> None:
    with starts() as found:
        run({**TEXT, "optimizer": INFINITE}, tmp_path / "run", "one")
    assert same(found[0].params, found[1].params)
    rates = [row["learning_rate"] for row in numbers(tmp_path / "run")]
    assert rates[:7] == rates[7:], "each warms up"
    with Checkpoints.reading(tmp_path / "run" / "checkpoints") as checkpoints:
        assert not [saved.mark for saved in checkpoints.notes() if "decay" in (saved.mark or "")]


def test_joint_training_decays_once(tmp_path: Path) -> None:
    run(TEXT, tmp_path / "run", "joint")
    rates = [row["learning_rate"] for row in numbers(tmp_path / "run")]
    assert rates == pytest.approx([0, *[1e-2] * 11, 7e-3, 4e-3])


@pytest.mark.slow
def test_steps_on_remembered_rows_count(tmp_path: Path) -> None:
    """An interleaved memory makes the second task longer, and the decay is at its end."""
    content = {**PAIRS, "optimizer": {**WSD, "decay": 2}, "evaluation": {"batch_size": 4, "max_new_tokens": 24}}
    content["training"] = {**PAIRS["training"], "keep_tasks": None}
    method = {"name": "replay", "replay": {"fraction": 0.25, "mode": "interleave", "every": 2}}
    with killed_at_save(3):
        run(content, tmp_path / "run", method)
    with starts() as found:
        run(content, tmp_path / "run", method)
    assert same(found[-1].params, stored(tmp_path / "run", mark_before_decay(0))[0])
    rows = [row for row in numbers(tmp_path / "run") if row["task"] == 1]
    assert {row["kind"] for row in rows} == {"task", "memory"}
    assert len(rows) > 3
    assert [row["learning_rate"] for row in rows] == pytest.approx([0, *[1e-2] * (len(rows) - 2), 5.5e-3])
    run(content, tmp_path / "whole", method)
    check_equal(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_private_training_counts_every_step(tmp_path: Path) -> None:
    privacy = {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3}
    content = {**TEXT, "training": {**TEXT["training"], "privacy": privacy}, "optimizer": {**WSD, "warm_moments": 1}}
    with killed_at_save(3):
        run(content, tmp_path / "run", "sequential")
    run(content, tmp_path / "run", "sequential")
    run(content, tmp_path / "whole", "sequential")
    check_equal(tmp_path / "run", tmp_path / "whole")
    plain = run({**content, "optimizer": {"learning_rate": 1e-2}}, tmp_path / "plain", "sequential")
    assert Results.read(tmp_path / "run" / "results.json").extra["privacy"] == plain.extra["privacy"]


@pytest.mark.parametrize(
    ("optimizer", "training", "message"),
    [
        (
            {**WSD, "decay": 7},
            {"steps": [9, 7]},
            "task pydantic: optimizer: warmup 1 and decay 7 steps",
        ),
        ({"warm_moments": 3}, {"epochs": 1}, "task topics: optimizer: warm_moments 3 leaves none of 3 steps"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    tmp_path: Path, optimizer: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    content = {**TEXT, "optimizer": optimizer, "training": {"batch_size": 8, **training}}
    with pytest.raises(UserError, match=message) as error:
        run(content, tmp_path / "run", "sequential")
    assert error.value.exit_code == 2
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_several_devices_go_on_exactly(tmp_path: Path) -> None:
    """Sharded params and moments of the trunk come back where they were."""
    script = Path(__file__).parent / "tiny" / "trunk_script.py"
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags(4)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"devices": 4, "equal": True}
