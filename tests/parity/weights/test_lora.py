"""Adapters as transformers' models compute with them: by PEFT itself, by hand, and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from jaxcl.models.network import Network
from jaxcl.weights import load_peft, read_lora, save_hf, save_peft
from jaxcl.weights.tree import flatten, unflatten
from tests.parity.weights.both_sides import AUTO, OURS, PAD, check, outputs_of_transformers, random_params
from tests.tiny.families import config_of

pytestmark = pytest.mark.optimised  # as jaxcl computes for its users

TARGETS = {
    "llama": ("query", "key", "value", "out", "gate", "up", "down"),
    "roberta": ("query", "value", "out", "down"),
    "bert": ("key", "up", "down"),
    # Tensors that hold several projections: all of a module, and some.
    "phi3": ("query", "key", "value", "out", "gate", "up", "down"),
    "phi3-few": ("query", "value", "up"),
    "gemma3_text": ("query", "key", "out", "gate", "down"),
    "qwen3_moe": ("query", "key", "value", "out"),
}
MODELS = OURS | {"phi3": config_of("phi3"), "phi3-few": config_of("phi3"), "gemma3_text": config_of("gemma3_text")}
MODELS["qwen3_moe"] = config_of("qwen3_moe")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What peft draws does not depend on the tests before."""
    torch.manual_seed(0)


@pytest.fixture(params=TARGETS)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Network, Any, Path]:
    """A network with adapters, and its base, merged and PEFT folders."""
    name = request.param
    lora = {"rank": 4, "alpha": 6.0, "targets": TARGETS[name]}
    network = Network.create(type(MODELS[name]).model_validate({**MODELS[name].model_dump(), "lora": lora}))
    params, plain = random_params(network), Network.create(MODELS[name])
    base = unflatten({path: leaf for path, leaf in flatten(params).items() if "lora" not in path})
    save_hf(tmp_path / "base", plain, base, token_ids={"pad_token_id": PAD})
    save_hf(tmp_path / "merged", network, params, token_ids={"pad_token_id": PAD})
    save_peft(tmp_path / "adapter", network, params, base=str(tmp_path / "base"))
    return name, network, params, tmp_path


def test_a_merged_folder_computes_the_same(folders: tuple[str, Network, Any, Path]) -> None:
    name, network, params, folder = folders
    model = AUTO.get(name, transformers.AutoModelForCausalLM).from_pretrained(folder / "merged").eval()
    check(outputs_of_transformers(model), network, params)


def test_a_peft_folder_applied_by_hand_computes_the_same(folders: tuple[str, Network, Any, Path]) -> None:
    name, network, params, folder = folders
    model = AUTO.get(name, transformers.AutoModelForCausalLM).from_pretrained(folder / "base").eval()
    before = outputs_of_transformers(model)["logits"]
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    with torch.no_grad():
        for key, a in tensors.items():
            if "lora_A" in key:
                module = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                b = tensors[key.replace("lora_A", "lora_B")]
                word = key.split(".")[-3]
                rank, alpha = config["rank_pattern"].get(word, config["r"]), config["alpha_pattern"].get(word)
                assert a.shape[0] == rank
                module.weight += (alpha or config["lora_alpha"]) / rank * (b @ a)
    found = outputs_of_transformers(model)
    assert np.abs(found["logits"] - before).max() > 0.1
    check(found, network, params)


@pytest.mark.filterwarnings("default::FutureWarning")  # peft asks transformers for an attribute by its old name
def test_peft_reads_the_folder_and_computes_the_same(folders: tuple[str, Network, Any, Path]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install --no-deps peft accelerate psutil")
    name, network, params, folder = folders
    base = AUTO.get(name, transformers.AutoModelForCausalLM).from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    check(outputs_of_transformers(model), network, params)
    # Every adapter of the file is one of the model's, and the other way round.
    held = {key.replace(".default", "") for key, _ in model.named_parameters() if "lora_" in key}
    assert held == set(load_file(folder / "adapter" / "adapter_model.safetensors"))


@pytest.mark.filterwarnings("default::FutureWarning")
@pytest.mark.parametrize("name", ["phi3", "qwen3"])
def test_adapters_that_peft_made_compute_the_same_here(name: str, tmp_path: Path) -> None:
    """One adapter on a fused module: its projections share the first matrix."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install --no-deps peft accelerate psutil")
    network = Network.create(config_of(name))
    params = random_params(network)
    save_hf(tmp_path / "base", network, params, token_ids={"pad_token_id": PAD})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    modules = ["qkv_proj", "o_proj", "gate_up_proj"] if name == "phi3" else ["q_proj", "v_proj", "down_proj"]
    kind = peft.LoraConfig(r=3, lora_alpha=5, target_modules=modules, rank_pattern={modules[1]: 2}, use_rslora=True)
    model = peft.get_peft_model(model, kind).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    wide = Network.create(config_of(name, lora=read_lora(tmp_path / "adapter", network)))
    adapted = unflatten(flatten(params) | flatten(load_peft(tmp_path / "adapter", wide)))
    check(outputs_of_transformers(model), wide, adapted)


@pytest.mark.filterwarnings("default::FutureWarning")
def test_the_auto_class_of_transformers_finds_base_and_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install --no-deps peft accelerate psutil")
    lora = {"rank": 2, "targets": ("query", "value")}
    network = Network.create(type(OURS["llama"]).model_validate({**OURS["llama"].model_dump(), "lora": lora}))
    params = random_params(network)
    plain = Network.create(OURS["llama"])
    base = unflatten({path: leaf for path, leaf in flatten(params).items() if "lora" not in path})
    save_hf(tmp_path / "base", plain, base, token_ids={"pad_token_id": PAD})
    save_peft(tmp_path / "adapter", network, params, base=str(tmp_path / "base"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    check(outputs_of_transformers(model), network, params)
