"""Adapters: fresh beside weights that have none, kept by Orbax, merged by Hugging Face's format, alone for PEFT."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxcl.errors import UserError
from jaxcl.models.network import Network
from jaxcl.weights import convert, load_params, load_peft, load_weights, read_lora, save_hf, save_orbax, save_peft
from jaxcl.weights.tree import flatten, unflatten
from tests.tiny.families import config_of
from tests.tiny.networks import CONFIGS, LORA, assert_equal_bits, random_params

ENCODER = ("query", "key", "value", "out", "up", "down")
DECODER = (*ENCODER, "gate")


def adapted(name: str, targets: tuple[str, ...], **compute: Any) -> Network:
    return Network.create(CONFIGS[name].model_validate({**CONFIGS[name].model_dump(), **fields(targets, compute)}))


def fields(targets: tuple[str, ...], compute: dict[str, Any]) -> dict[str, Any]:
    return {"lora": {**LORA, "targets": targets}, "compute": compute}


def base_of(params: Any) -> dict[str, Any]:
    return {path: leaf for path, leaf in flatten(params).items() if "lora" not in path}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_weights_without_adapters_get_fresh_ones(name: str, tmp_path: Path) -> None:
    plain, network = Network.create(CONFIGS[name]), adapted(name, ENCODER)
    params = random_params(plain)
    save_hf(tmp_path / "hf", plain, params)
    save_orbax(tmp_path / "orbax", plain, params)
    for folder in ("hf", "orbax"):
        found = load_params(tmp_path / folder, network, key=jax.random.key(4))
        assert_equal_bits(unflatten(base_of(found)), params)
        drawn = flatten(network.init(jax.random.key(4)))
        for path in flatten(found).keys() - base_of(found).keys():
            # Two programs, which may round differently in the last bit.
            np.testing.assert_allclose(flatten(found)[path], drawn[path], rtol=1e-6)
        with pytest.raises(UserError, match="is missing, and 11 more: the checkpoint lacks an adapter"):
            load_params(tmp_path / folder, network)


def test_orbax_keeps_adapters_in_their_own_precision(tmp_path: Path) -> None:
    network = adapted("llama", DECODER, param_dtype="bfloat16")
    params = random_params(network)
    save_orbax(tmp_path / "model", network, params)
    read, found = load_weights(tmp_path / "model")
    assert read.config == network.config
    assert_equal_bits(found, params)
    assert found["blocks"]["mlp"]["up"]["lora_b"].dtype == jnp.float32
    with pytest.raises(UserError, match=r"no parameter for the tensor blocks/\w+/\w+/lora_a, and 13 more"):
        load_params(tmp_path / "model", Network.create(read.config.model_copy(update={"lora": None})))


@pytest.mark.parametrize(("name", "targets"), [("llama-biases", DECODER), ("roberta", ENCODER), ("llama", ("value",))])
def test_hugging_face_folders_hold_the_products(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    network = adapted(name, targets)
    params = flatten(random_params(network))
    save_orbax(tmp_path / "kept", network, unflatten(params))
    convert(tmp_path / "kept", tmp_path / "merged")
    plain, found = load_weights(tmp_path / "merged")
    assert plain.config.lora is None
    for path, leaf in flatten(found).items():
        expected = np.asarray(params[path], np.float64)
        projection = path.removesuffix("/kernel")
        if f"{projection}/lora_a" in params:
            a, b = (np.asarray(params[f"{projection}/lora_{side}"], np.float64) for side in "ab")
            flat = a.reshape(len(a), -1, 3) @ b.reshape(len(b), 3, -1)
            expected = expected + 5 / 3 * flat.reshape(expected.shape)
            assert not np.allclose(leaf, params[path])
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-5, err_msg=path)


def test_peft_folders_hold_the_adapters_under_pefts_names(tmp_path: Path) -> None:
    network = adapted("llama", ("query", "out"))
    params = random_params(network)
    save_peft(tmp_path / "adapter", network, params, base="models/base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (3, 5.0, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == "models/base"
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 3 * 2 * 2
    layer = "base_model.model.model.layers.1.self_attn."
    attention = jax.tree.map(lambda leaf: np.asarray(leaf)[1], params["blocks"]["attention"])
    np.testing.assert_array_equal(tensors[f"{layer}q_proj.lora_A.weight"], attention["query"]["lora_a"].T)
    np.testing.assert_array_equal(
        tensors[f"{layer}q_proj.lora_B.weight"], attention["query"]["lora_b"].reshape(3, -1).T
    )
    np.testing.assert_array_equal(tensors[f"{layer}o_proj.lora_A.weight"], attention["out"]["lora_a"].reshape(-1, 3).T)
    np.testing.assert_array_equal(tensors[f"{layer}o_proj.lora_B.weight"], attention["out"]["lora_b"].T)


def test_modules_that_share_their_last_word_are_named_whole(tmp_path: Path) -> None:
    network = adapted("roberta", ("query", "down"))
    save_peft(tmp_path / "adapter", network, random_params(network))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["query", *(f"roberta.encoder.layer.{n}.output.dense" for n in range(3))]


def test_a_model_without_adapters_has_none_to_write(tmp_path: Path) -> None:
    network = Network.create(CONFIGS["llama"])
    save_orbax(tmp_path / "model", network, random_params(network))
    with pytest.raises(UserError, match=r"no adapters \(model\.lora\); allowed formats are hf, orbax"):
        convert(tmp_path / "model", tmp_path / "adapter", format="peft")
    assert not (tmp_path / "adapter").exists()


def adapters_of(params: Any) -> dict[str, Any]:
    return {path: leaf for path, leaf in flatten(params).items() if "lora" in path}


def product_of(adapters: dict[str, Any], projection: str, scale: float) -> np.ndarray:
    """What the adapter of a projection adds to its kernel, `[layers, inputs, outputs]`."""
    a, b = (np.asarray(adapters[f"blocks/{projection}/lora_{part}"], np.float64) for part in "ab")
    a, b = a.reshape(len(a), -1, a.shape[-1]), b.reshape(len(b), b.shape[1], -1)
    return scale * a @ b


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_adapters_of_a_peft_folder_are_read_to_the_bit(name: str, tmp_path: Path) -> None:
    network = adapted(name, ("query", "out", "down"))
    params = random_params(network)
    save_peft(tmp_path / "adapter", network, params)
    found = read_lora(tmp_path / "adapter", Network.create(CONFIGS[name]))
    assert found.model_dump() == {**LORA, "targets": ("down", "out", "query")}
    read = load_peft(tmp_path / "adapter", Network.create(network.config.model_copy(update={"lora": found})))
    assert_equal_bits(read, unflatten(adapters_of(params)))


@pytest.mark.parametrize("targets", [("query", "key", "value", "up"), ("query", "value")])
def test_adapters_on_a_fused_module_are_read_back_as_what_they_add(targets: tuple[str, ...], tmp_path: Path) -> None:
    network = Network.create(config_of("phi3", lora={"rank": 2, "alpha": 3.0, "targets": targets}))
    params = random_params(network)
    save_peft(tmp_path / "adapter", network, params)
    found = read_lora(tmp_path / "adapter", network)
    assert found.scale == 1.5
    wider = Network.create(config_of("phi3", lora=found))
    read = adapters_of(load_peft(tmp_path / "adapter", wider))
    for target in targets:
        projection = f"{'mlp' if target == 'up' else 'attention'}/{target}"
        np.testing.assert_allclose(
            product_of(read, projection, found.scale), product_of(adapters_of(params), projection, 1.5), atol=1e-5
        )
    # A module that holds several projections gives all of them an adapter, of nothing where there was none.
    for target in set(found.targets) - set(targets):
        projection = f"{'mlp' if target == 'gate' else 'attention'}/{target}"
        assert np.all(product_of(read, projection, found.scale) == 0)


def test_modules_of_other_ranks_and_factors_are_read_as_what_they_add(tmp_path: Path) -> None:
    network = adapted("llama", ("query", "down"))
    params = random_params(network)
    save_peft(tmp_path / "adapter", network, params)
    file, config = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_config.json"
    tensors = load_file(file)
    for name in [name for name in tensors if "down_proj" in name]:
        tensors[name] = tensors[name][:1] if "lora_A" in name else tensors[name][:, :1]
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, file)
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"down_proj": 2.5}}))
    read = adapters_of(load_peft(tmp_path / "adapter", network))
    cut = {path: leaf[..., :1] if path.endswith("a") else leaf[:, :1] for path, leaf in adapters_of(params).items()}
    scale = network.config.lora.scale
    np.testing.assert_allclose(product_of(read, "mlp/down", scale), product_of(cut, "mlp/down", 2.5), atol=1e-5)
    np.testing.assert_allclose(
        product_of(read, "attention/query", scale), product_of(adapters_of(params), "attention/query", scale)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, r"adapter_config.json: peft_type=IA3 is not supported; allowed is LORA"),
        ({"use_dora": True}, r"use_dora=True is not supported; allowed is False"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
    ],
)
def test_adapters_of_other_kinds_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    network = adapted("llama", ("query",))
    save_peft(tmp_path / "adapter", network, random_params(network))
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        load_peft(tmp_path / "adapter", network)


def test_adapters_that_do_not_fit_the_network_are_named(tmp_path: Path) -> None:
    network = adapted("llama", ("query", "up"))
    save_peft(tmp_path / "adapter", network, random_params(network))
    with pytest.raises(UserError, match=r"no adapters \(model.lora\)"):
        load_peft(tmp_path / "adapter", Network.create(CONFIGS["llama"]))
    with pytest.raises(UserError, match=r"layers.0.mlp.down_proj.lora_A.weight is missing; see model.lora.targets"):
        load_peft(tmp_path / "adapter", adapted("llama", ("query", "up", "down")))
    with pytest.raises(UserError, match=r"no adapter for the tensor .*layers.0.mlp.up_proj"):
        load_peft(tmp_path / "adapter", adapted("llama", ("query",)))
    with pytest.raises(UserError, match=r"no module model.layers.0.mlp.up_proj that could have an adapter"):
        read_lora(tmp_path / "adapter", Network.create(CONFIGS["bert"]))
    small = network.config.model_copy(update={"lora": network.config.lora.model_copy(update={"rank": 2})})
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight has shape \[3, 24\]; .* needs \[2, 24\]"):
        load_peft(tmp_path / "adapter", Network.create(small))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": None}, "r is None; expected a number above 0"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"rank_pattern": [1]}, "rank_pattern is not an object"),
        ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern: q_proj is True"),
    ],
)
def test_odd_settings_of_adapters_are_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    network = adapted("llama", ("query",))
    save_peft(tmp_path / "adapter", network, random_params(network))
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    for use in (read_lora, load_peft):
        with pytest.raises(UserError, match=f"adapter_config.json: {message}"):
            use(tmp_path / "adapter", network)


def test_a_file_without_adapters_is_named(tmp_path: Path) -> None:
    network = adapted("llama", ("query",))
    save_peft(tmp_path / "adapter", network, random_params(network))
    for tensors in ({}, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones(3, np.float32)}):
        save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
        with pytest.raises(UserError, match=r"adapter_model.safetensors holds no usable adapters"):
            read_lora(tmp_path / "adapter", network)
    parts = {
        f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{part}.weight": np.ones(3, np.float32)
        for n in range(network.num_layers)
        for part in "AB"
    }
    save_file(parts, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(UserError, match=r"q_proj.lora_[AB].weight has shape \[3\]; expected two axes"):
        load_peft(tmp_path / "adapter", network)
