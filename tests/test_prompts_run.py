"""A whole run with a soft prompt a task: nothing of an earlier task changes, and its answers need its name."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxcl.commands.convert import convert
from jaxcl.commands.generate import generate_text
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.run.model import load_model
from jaxcl.weights.tree import flatten
from tests.tiny.runs import PAIRS, TEXT, run

CONTENT: dict[str, Any] = {
    **PAIRS,
    "model": {**PAIRS["model"], "soft_tokens": 8},
    "training": {"batch_size": 8, "steps": 3, "log_every": 1},
    "optimizer": {"learning_rate": 3e-2, "weight_decay": 0.1},
    "evaluation": {"batch_size": 4, "max_new_tokens": 24},
}
METHOD = {"name": "progressive_prompts", "length": 3}
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "seed": 0, "raw": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "prompts"
    assert run(CONTENT, folder, METHOD).finished
    return folder


def test_only_prompts_of_learned_tasks_have_moved(folder: Path) -> None:
    model = load_model(str(folder))
    start = flatten(jax.jit(model.network.init)(jax.random.key(0)))
    for path, leaf in flatten(model.params).items():
        assert np.array_equal(leaf, start[path]) == (path != "soft_tokens/embedding"), path
    words, soft = start["embed/embedding"], flatten(model.params)["soft_tokens/embedding"]
    still = [bool((words == vector).all(axis=1).any()) for vector in soft]
    assert still == [False] * 6 + [True] * 2  # 2 tasks of 3, two left over


def test_an_earlier_task_is_answered_as_when_it_was_learned(folder: Path) -> None:
    results = Results.read(folder / "results.json")
    assert results.matrix[1][0] == results.matrix[0][0]
    assert results.bwt == 0.0
    files = [folder / "predictions" / f"after0{after}_task00.jsonl" for after in (0, 1)]
    answers = [[json.loads(line)["prediction"] for line in file.read_text().splitlines()] for file in files]
    assert answers[0] == answers[1]
    assert any(answers[0])


def test_a_prompt_needs_its_task(folder: Path) -> None:
    with pytest.raises(UserError, match=r"progressive_prompts needs to know the task; give --task, allowed: direc"):
        generate_text(str(folder), "DIGIT ONE", **OPTIONS)
    with pytest.raises(UserError, match="--task categories: unknown; allowed: direction, category"):
        generate_text(str(folder), "DIGIT ONE", task="categories", **OPTIONS)
    assert isinstance(generate_text(str(folder), "DIGIT ONE", task="category", **OPTIONS), str)


def test_no_format_of_others_has_a_place_for_prompts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the model has soft tokens .* the allowed format is orbax"):
        convert(str(folder), tmp_path / "hf", "hf", "float32")
    with pytest.raises(UserError, match="the model has soft tokens; allowed formats are orbax"):
        convert(str(folder), tmp_path / "peft", "peft", "float32")
    kept = load_model(str(convert(str(folder), tmp_path / "orbax", "orbax", "float32")))
    jax.tree.map(np.testing.assert_array_equal, kept.params, load_model(str(folder)).params)


def test_running_text_has_no_prompts(tmp_path: Path) -> None:
    content = {**CONTENT, "data": {"length": 32}, "tasks": [{**TEXT["tasks"][1]}]}
    with pytest.raises(UserError, match=r"method\.name: progressive_prompts needs prompts and answers; task pydantic"):
        run(content, tmp_path / "run", METHOD)
