"""Every registered method through a whole tiny run, and what the experiment does for methods that ask for it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcl.evaluation.results import Results
from jaxcl.methods import METHODS, find_method
from jaxcl.methods.base import Method
from jaxcl.training.trainer import Trainer
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import PAIRS, TEXT, numbers, run

# Whole runs of these are looked at more closely in test_experiment, test_lora_run and test_prompts_run.
ELSEWHERE = {"seekr", "olora", "progressive_prompts"}
# What others of the kind do in a whole run.
SLOW = {"das_paper", "lwf", "joint", "sdft"}
REPLAY = {"fraction": 0.25, "every": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "replay": {"replay": REPLAY},
    "derpp": {"replay": REPLAY, "match": "logits"},
    "agem": {"replay": {"fraction": 0.25, "mode": "mix"}},
    "das": {"importance_examples": 8},
    "das_paper": {"importance_examples": 8},
    "ewc": {"fisher_examples": 8},
}
# It reads rows twice.
MODELS: dict[str, dict[str, Any]] = {"sdft": {"max_length": 176}}
SHORT = {
    **PAIRS,
    "training": {"batch_size": 8, "steps": 3, "log_every": 1},
    "evaluation": {"batch_size": 4, "limit": 2, "max_new_tokens": 24},
}
DOMAINS = {**TEXT, "evaluation": {"batch_size": 8}, "tasks": [{**task, "end_task": None} for task in TEXT["tasks"]]}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in sorted(METHODS.keys() - ELSEWHERE)],
)
def test_a_whole_run(name: str, tmp_path: Path) -> None:
    content = {**SHORT, "model": {**SHORT["model"], **MODELS.get(name, {})}}
    results = run(content, tmp_path / "run", {"name": name, **OPTIONS.get(name, {})})
    assert results.finished
    assert results.op is not None
    rows = numbers(tmp_path / "run")
    assert all(np.isfinite(row["loss"]) for row in rows)
    remembers = "replay" in find_method(name).Options.model_fields
    assert (tmp_path / "run" / "memory.json").exists() == remembers
    # With mode mix, every step of the second task is on remembered rows as well.
    assert ("memory" in {row["kind"] for row in rows}) == (remembers and name != "agem")


@pytest.mark.slow
def test_remembered_masked_text_is_matched_as_it_was_stored(tmp_path: Path) -> None:
    """With a learning rate of 0 outputs equal the stored ones only if the same tokens are masked, epoch by epoch."""
    content = {
        **DOMAINS,
        "optimizer": {"learning_rate": 0.0},
        "training": {"batch_size": 8, "steps": 9, "log_every": 1},
    }
    content["model"] = {**TEXT["model"], "hidden_dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.5}
    run(content, tmp_path / "run", {"name": "derpp", "replay": {"fraction": 0.25, "every": 1}})
    matches = [row["term/match"] for row in numbers(tmp_path / "run") if row["kind"] == "memory"]
    assert len(matches) > 3
    np.testing.assert_allclose(matches, 0.0, atol=1e-9)


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `one`, which keeps what each task started from in `starts`."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    original, starts = Trainer.start_task, []

    def start_task(self: Any, state: Any, total: int, **options: Any) -> Any:
        starts.append(jax.tree.map(np.array, (state.params, state.opt_state, state.method_state)))
        return original(self, state, total, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "start_task", start_task)
        run({**PAIRS, "optimizer": {"learning_rate": 1e-2, "reset_optimizer": False}}, folder, "one")
    assert len(starts) == 2
    jax.tree.map(np.testing.assert_array_equal, *starts)
    return folder


def test_each_task_of_one_has_a_model_of_its_own(one_folder: Path) -> None:
    results = Results.read(one_folder / "results.json")
    assert results.initial is not None
    first, second = results.matrix
    assert first[1] is None, "the second task's model does not exist yet"
    assert first[0] == second[0]
    assert None not in second
    assert results.bwt == 0.0
    assert results.forgetting == 0.0
    assert [path.name for path in sorted((one_folder / "predictions").glob("after*"))][-1] == "after01_task01.jsonl"
    assert not (one_folder / "predictions" / "after01_task00.jsonl").exists()


@pytest.mark.parametrize("saves", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_an_interrupted_run_of_one_goes_on(one_folder: Path, tmp_path: Path, saves: int) -> None:
    """Killed at the end of the first task, which the second must not go on from, and within the second."""
    content = {**PAIRS, "optimizer": {"learning_rate": 1e-2, "reset_optimizer": False}}
    with killed_at_save(saves):
        run(content, tmp_path / "run", "one")
    results = run(content, tmp_path / "run", "one")
    whole = Results.read(one_folder / "results.json")
    assert (results.matrix, results.initial) == (whole.matrix, whole.initial)
    assert numbers(tmp_path / "run") == numbers(one_folder)


class Silenced(Method):
    """Answers the first task with params of 0, which give every token the same score."""

    def params_for(self, params: Any, state: Any, index: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.where(index == 0, 0.0, leaf), params)


@pytest.mark.slow
def test_a_method_may_answer_each_task_with_other_params(tmp_path: Path) -> None:
    tasks = [DOMAINS["tasks"][0], {**DOMAINS["tasks"][1], "end_task": TEXT["tasks"][0]["end_task"]}]
    content = {**DOMAINS, "tasks": tasks, "evaluation": TEXT["evaluation"]}
    results = run(content, tmp_path / "run", {"name": f"{__name__}:Silenced"})
    assert [row[0] for row in results.matrix] == pytest.approx([300.0, 300.0], rel=1e-4)
    assert abs(results.matrix[1][1] - 300.0) > 1.0  # type: ignore[operator]
    # A measure that only the second task has appears with the second row.
    assert results.further["end task accuracy"].matrix[0] == [None, None]
    assert results.further["end task accuracy"].matrix[1][1] is not None
