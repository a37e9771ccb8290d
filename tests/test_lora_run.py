"""Whole runs with adapters, from training to the model that is taken elsewhere."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxcl.commands.convert import convert
from jaxcl.commands.generate import generate_text
from jaxcl.config import parse_config
from jaxcl.config.file import ConfigError
from jaxcl.errors import UserError
from jaxcl.models.trainable import trained
from jaxcl.run.model import load_model
from jaxcl.weights import load_weights
from jaxcl.weights.tree import flatten
from tests.tiny.runs import PAIRS, run

LORA = {"rank": 2, "targets": ["query", "down"]}
ADAPTED: dict[str, Any] = {
    **PAIRS,
    "model": {**PAIRS["model"], "lora": LORA},
    "optimizer": {"learning_rate": 3e-2},
    "evaluation": {"batch_size": 4, "max_new_tokens": 24},
}
PROMPT = "DIGIT ONE\nCategory:"


def answer(model: Path) -> str:
    return generate_text(str(model), PROMPT, max_new_tokens=4, temperature=0.0, top_p=1.0, seed=0, raw=True)


@pytest.fixture(scope="module")
def olora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "olora"
    results = run(ADAPTED, folder, "olora")
    assert results.finished
    assert [len(row) for row in results.matrix] == [2, 2]
    return folder


@pytest.fixture(scope="module")
def exported(olora: Path) -> Path:
    return convert(str(olora), olora.parent / "exported", "hf", "float32")


def test_tasks_after_the_first_pay_for_overlap(olora: Path) -> None:
    rows = [json.loads(line) for line in (olora / "metrics.jsonl").read_text().splitlines()]
    overlaps = {task: [row["term/orthogonality"] for row in rows if row["task"] == task] for task in (0, 1)}
    assert set(overlaps[0]) == {0.0}
    assert min(overlaps[1]) > 0.0


def test_an_exported_run_is_a_plain_model_with_the_same_answers(olora: Path, exported: Path) -> None:
    kept = load_model(str(olora))
    plain, params = load_weights(exported)
    assert plain.config.lora is None
    # The last task's adapter went into the weights too, and a fresh one stands beside them.
    for path, leaf in flatten(trained(kept.params)).items():
        assert np.any(leaf) == path.endswith("lora_a"), path
    np.testing.assert_array_equal(
        flatten(params)["blocks/mlp/down/kernel"], flatten(kept.params)["blocks/mlp/down/kernel"]
    )
    assert answer(exported) == answer(olora)


def test_adapters_beside_changed_weights_are_not_written_alone(olora: Path) -> None:
    with pytest.raises(UserError, match="olora changes the weights, too"):
        convert(str(olora), olora.parent / "nothing", "peft", "float32")


@pytest.mark.slow
def test_a_model_from_elsewhere_learns_by_adapters_alone(exported: Path) -> None:
    folder = exported.parent / "lora"
    content = {**ADAPTED, "weights": str(exported), "model": {"lora": LORA}, "tasks": ADAPTED["tasks"][:1]}
    assert run({**content, "tokenizer": {}}, folder, "sequential").finished
    model, base = load_model(str(folder)), flatten(load_weights(exported)[1])
    flat = flatten(model.params)
    for path, leaf in base.items():
        np.testing.assert_array_equal(flat[path], leaf, err_msg=path)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(trained(model.params)))
    convert(str(folder), folder.parent / "merged", "hf", "float32")
    assert answer(folder.parent / "merged") == answer(folder)
    adapter = convert(str(folder), folder.parent / "adapter", "peft", "float32")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(exported)
    assert (adapter / "tokenizer.json").is_file()
    tensors = load_file(exported / "model.safetensors")
    kept = (exported / "model.safetensors").read_bytes()
    save_file(
        {name: tensor * 1.5 for name, tensor in tensors.items()}, exported / "model.safetensors", {"format": "pt"}
    )
    try:
        with pytest.raises(UserError, match=r"the weights .* are not those that the run was started with"):
            convert(str(folder), folder.parent / "other", "peft", "float32")
    finally:
        (exported / "model.safetensors").write_bytes(kept)


@pytest.mark.slow
def test_an_adapter_a_task_is_separate_models_with_adapters(tmp_path: Path) -> None:
    results = run({**ADAPTED, "training": {"batch_size": 8, "steps": 2}}, tmp_path / "one", "one")
    assert [results.matrix[1][task] is not None for task in (0, 1)] == [True, True]
    assert results.matrix[1][0] == results.matrix[0][0]
    model = load_model(str(tmp_path / "one"))
    start = flatten(jax.jit(model.network.init)(jax.random.key(0)))
    for path, leaf in flatten(model.params).items():
        assert np.array_equal(leaf, start[path]) == ("lora" not in path), path


def test_olora_needs_adapters() -> None:
    with pytest.raises(ConfigError, match=r"method\.name: olora trains adapters and the model has none"):
        parse_config({**PAIRS, "output": "runs/x", "method": "olora"})
