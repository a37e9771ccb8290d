"""Whole runs with quantised weights, from the command line to the model that is taken elsewhere."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from jaxcl.cli import main
from jaxcl.commands.convert import convert
from jaxcl.commands.generate import generate_text
from jaxcl.config import parse_config
from jaxcl.config.file import ConfigError
from jaxcl.errors import UserError
from jaxcl.evaluation.results import Results
from jaxcl.models.trainable import trained
from jaxcl.run.model import load_model
from jaxcl.weights.tree import flatten
from tests.tiny.faults import killed_at_save
from tests.tiny.runs import PAIRS, SEEKR, TEXT, numbers, run

LORA = {"rank": 2, "targets": ["query", "down"]}
HELD: dict[str, Any] = {
    **PAIRS,
    "model": {**PAIRS["model"], "lora": LORA, "quantise": "int8"},
    "optimizer": {"learning_rate": 3e-2},
    "evaluation": {"batch_size": 4, "limit": 2, "max_new_tokens": 24},
}


def answer(model: Path) -> str:
    prompt = "DIGIT ONE\nCategory:"
    return generate_text(str(model), prompt, max_new_tokens=4, temperature=0.0, top_p=1.0, seed=0, raw=True)


@pytest.fixture(scope="module")
def seekr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "seekr.yaml").write_text(yaml.safe_dump({**HELD, "output": str(folder / "run"), "method": SEEKR}))
    assert main(["run", str(folder / "seekr.yaml")]) == 0
    return folder / "run"


def test_adapters_learn_beside_weights_that_keep_every_bit(seekr: Path) -> None:
    assert Results.read(seekr / "results.json").finished
    assert {row["kind"] for row in numbers(seekr)} == {"task", "memory"}
    model = load_model(str(seekr))
    start = flatten(jax.jit(model.network.init)(jax.random.key(0)))
    for path, leaf in flatten(model.params).items():
        assert leaf.dtype == start[path].dtype
        assert np.array_equal(leaf, start[path]) == ("lora" not in path), path
    assert len(jax.tree.leaves(trained(model.params))) == 4


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_same_bits(seekr: Path, tmp_path: Path) -> None:
    with killed_at_save(3):
        run(HELD, tmp_path / "run", SEEKR)
    results = run(HELD, tmp_path / "run", SEEKR)
    assert results.matrix == Results.read(seekr / "results.json").matrix
    assert numbers(tmp_path / "run") == numbers(seekr)
    other = {**HELD, "model": {**HELD["model"], "quantise": "nf4"}}
    with pytest.raises(UserError, match=r"model.quantise='int8', this one has 'nf4'"):
        run(other, tmp_path / "run", SEEKR)


def test_the_exported_model_has_the_answers_of_the_run(seekr: Path, tmp_path: Path) -> None:
    convert(str(seekr), tmp_path / "hf", "hf", "float32")
    assert answer(tmp_path / "hf") == answer(seekr)
    convert(str(seekr), tmp_path / "orbax", "orbax", "float32")
    assert answer(tmp_path / "orbax") == answer(seekr)


@pytest.mark.slow
def test_replay_beside_nf4_and_other_weights_than_those_of_the_start(seekr: Path, tmp_path: Path) -> None:
    """The weights are those that were exported, read while they are quantised."""
    convert(str(seekr), tmp_path / "hf", "hf", "float32")
    content = {**HELD, "weights": str(tmp_path / "hf"), "model": {"lora": LORA, "quantise": "nf4"}, "tokenizer": {}}
    method = {"name": "replay", "replay": {"fraction": 0.25}}
    assert run(content, tmp_path / "run", method).finished
    assert load_model(str(tmp_path / "run")).params["blocks"]["mlp"]["up"]["kernel"].dtype == np.uint8


@pytest.mark.slow
def test_das_and_end_tasks_beside_quantised_weights(tmp_path: Path) -> None:
    content = {**TEXT, "model": {**TEXT["model"], "lora": LORA, "quantise": "nf4"}}
    results = run(content, tmp_path / "run", {"name": "das", "importance_examples": 8})
    assert results.finished
    assert results.further["end task macro_f1"].matrix[1][0] is not None


def test_what_changes_the_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.name: olora adds adapters to the weights.*model.quantise=none"):
        parse_config({**HELD, "output": "runs/x", "method": "olora"})
    content = {**HELD, "model": {**PAIRS["model"], "quantise": "int8"}, "output": "runs/x", "method": "sequential"}
    with pytest.raises(ConfigError, match=r"model: quantise: int8 holds weights that are not trained; set model.lora"):
        parse_config(content)
